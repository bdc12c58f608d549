"""The page at /docs: the server's endpoints and the fields of their bodies, without JavaScript.

It is generated from the pydantic models that validate the bodies.
"""

import base64
import hashlib
from html import escape
from typing import NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaValue

from jaxgpt.serve.bodies import (
    NEUTRAL,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
)


class Route(NamedTuple):
    """The documentation of one endpoint."""

    method: str
    path: str
    about: str
    body: type[BaseModel] | None = None
    example: str = ""


ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions",
        "Answers a conversation, as OpenAI's API does. If the last message is the assistant's, the "
        "model continues its text. Tools are accepted but ignored: the model answers in text, and "
        "the response header x-jaxgpt-ignored says so. A required tool call is an error.",
        ChatBody,
        '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}',
    ),
    Route(
        "POST",
        "/v1/completions",
        "Continues text, as OpenAI's completions API does. With echo, logprobs and max_tokens 0 it "
        "scores the prompt. A text prompt begins with the tokenizer's beginning-of-document "
        "token, which echo does not show (see add_special_tokens); token ids are used unchanged.",
        CompletionBody,
        '{"prompt": "Once upon", "max_tokens": 0, "echo": true, "logprobs": 1}',
    ),
    Route(
        "POST",
        "/v1/embeddings",
        "Computes embeddings: unit vectors from the model's last hidden states.",
        EmbeddingBody,
        '{"input": ["a text", "another"]}',
    ),
    Route("POST", "/tokenize", "Encodes a text or a conversation to token ids.", TokenizeBody),
    Route("POST", "/detokenize", "Decodes token ids to text.", DetokenizeBody),
    Route("GET", "/v1/models", "Lists the model."),
    Route("GET", "/info", "The model's name, whether it can chat, and its context in tokens."),
    Route(
        "GET",
        "/health",
        "The server's state: loading, ok, draining or stalled. Status 200 if it is ok, else 503.",
    ),
    Route("GET", "/metrics", "Counters and latencies, in the text format of Prometheus."),
    Route("GET", "/", "The chat page."),
)
STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
td { border-top: 1px solid #8886; padding: .3rem .6rem .3rem 0; vertical-align: top }
pre { overflow-x: auto; padding: .6rem; background: #8882 }
"""


def page() -> tuple[str, str]:
    """Returns the page's HTML, and a content security policy that allows only its own style."""
    neutral = ", ".join(
        f"{name}: {' or '.join(map(str, values))}".lower() for name, values in NEUTRAL.items()
    )
    content = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>jaxgpt: API</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style><h1>The server's API</h1>"
        "<p>Bodies are JSON objects. A field that is null is the same as an absent one. An unknown "
        "field is an error, unless it is null, [] or {}, or has a value that requests the default "
        f"behavior: {escape(neutral)}. Errors have OpenAI's format and name the field. While the "
        "model is loading, the status of every response is 503.</p>"
        + "".join(map(_section, ROUTES))
        + "</html>"
    )
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return content, f"default-src 'none'; style-src 'sha256-{digest}'; frame-ancestors 'none'"


def _section(route: Route) -> str:
    shown = f"<h2>{route.method} {route.path}</h2><p>{escape(route.about)}</p>"
    if route.example:
        command = (
            f"curl http://127.0.0.1:8000{route.path} -H 'content-type: application/json' "
            f"-d '{route.example}'"
        )
        shown += f"<pre>{escape(command)}</pre>"
    if route.body is None:
        return shown
    schema = route.body.model_json_schema()
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code><td>{escape(_type(field, schema))}"
        f"{', required' if name in required else ''}<td>{escape(field.get('description', ''))}"
        for name, field in schema["properties"].items()
    )
    return f"{shown}<table>{rows}</table>"


def _type(field: JsonSchemaValue, schema: JsonSchemaValue) -> str:
    """Describes a field's type in words."""
    if "$ref" in field:
        inner = schema["$defs"][field["$ref"].rpartition("/")[2]]
        return f"object of {', '.join(inner['properties'])}"
    if "anyOf" in field:
        kinds = [_type(each, schema) for each in field["anyOf"] if each.get("type") != "null"]
        return " or ".join(kinds)
    if "enum" in field or "const" in field:
        return " or ".join(map(repr, field.get("enum", [field.get("const")])))
    if field.get("type") == "array":
        most = f"up to {field['maxItems']} of " if "maxItems" in field else ""
        return f"list of {most}{_type(field['items'], schema)}"
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    limits = "" if low is None and high is None else f" from {low}" if high is None else ""
    limits = limits or ("" if high is None else f" {low} to {high}")
    kind = str(field.get("type", "any"))
    return {"string": "text", "boolean": "true or false"}.get(kind, kind) + limits
