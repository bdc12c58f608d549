"""Request bodies: strict JSON, validated by one pydantic model for each path.

A field that is unknown, given twice, of another type or out of range is refused by its name;
nothing is cast, clipped or cut. A field of OpenAI's or vLLM's that this server lacks is accepted if
its value asks for nothing: null, [], {} and the values in `NEUTRAL`.
"""

import json
import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from jaxgpt.generation.constrained import Guide, choices, json_schema, regex
from jaxgpt.generation.sampling import Sampling
from jaxgpt.serve.constraints import Constraint

SEEDS = 1 << 63
STOPS = 16
"""Stop strings of a request, at most."""
INPUTS = 2048
"""Texts of one call of /v1/embeddings, at most."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "early_stopping": (False,),
    "echo": (False,),
    "ignore_eos": (False,),
    "include_obfuscation": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parse_special": (False,),
    "reasoning_effort": ("none",),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "truncation": ("disabled",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
"""Fields that are not supported, with the values that ask for what happens anyway."""


class Refused(Exception):
    """An answer that is an error: a status, and what OpenAI's error objects say."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            status, "server_error" if status >= 500 else "invalid_request_error"
        )
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _joined(value: Any) -> Any:
    """The text of a message's parts; what is not a list of text parts stays."""
    if not isinstance(value, list):
        return value
    texts = [part.get("text") for part in value if isinstance(part, dict)]
    parts = [{"type": "text", "text": text} for text in texts if isinstance(text, str)]
    if parts != value:
        raise ValueError('give text, or parts that are {"type": "text", "text": ...}')
    return "".join(part["text"] for part in parts)


def _finite(value: Any) -> Any:
    """JSON whose numbers are all within the range of a double; ValueError for others."""

    def check(number: str) -> float:
        if not math.isfinite(double := float(number)):
            raise ValueError(f"the number {number[:20]}... is too large")
        return double

    json.loads(json.dumps(value, allow_nan=False), parse_int=check)
    return value


def _id(key: str) -> int:
    """A key that is a token id; not " 1", "+1", "01" or "1_0", which int() reads as well."""
    if not re.fullmatch("0|-?[1-9][0-9]*", key):
        raise ValueError('give a token id in decimal digits, such as "42"')
    return int(key)


def _texts(value: Any) -> list[str | list[int]]:
    """One text or several, as text or as token ids."""
    texts = [value] if isinstance(value, str) or (_are(int, value) and value) else value
    if not texts or not (
        _are(str, texts) or (_are(list, texts) and all(x and _are(int, x) for x in texts))
    ):
        raise ValueError("give text, texts, token ids, or lists of token ids, and none without one")
    return texts


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a field that is not supported has a value that asks for nothing."""
    is_bool = isinstance(value, bool)
    return value in (None, [], {}) or any(
        value == each and isinstance(each, bool) == is_bool for each in NEUTRAL.get(name, ())
    )


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
Positive = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Id = Annotated[int, BeforeValidator(_id)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Texts = Annotated[
    list[str | list[int]],
    PlainValidator(_texts),
    WithJsonSchema({"anyOf": [_STRING, _list(_STRING), _list(_INTEGER), _list(_list(_INTEGER))]}),
]


class Body(BaseModel):
    """Fields of JSON, none of them cast, and no others but those that ask for nothing."""

    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="after")
    def _check_others(self) -> "Body":
        for name, value in (self.model_extra or {}).items():
            if not _is_neutral(name, value):
                raise PydanticCustomError(
                    "unsupported", "not supported here; leave it out", {"field": name}
                )
        return self


class StreamOptions(Body):
    """Of an answer in pieces."""

    include_usage: bool = False
    """Whether the last event has the usage."""


class JSONSchema(Body):
    """What a JSON answer has to look like."""

    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema"), AfterValidator(_finite)]
    strict: bool | None = None


class ResponseFormat(Body):
    """Text, a JSON object (nested up to `constrained.DEPTH`), or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class Asked(Body):
    """What both ways of asking have in common; a field that is null is as one left out."""

    model: str | None = None
    """The model's name, as /v1/models says it."""
    max_tokens: Positive | None = None
    """Tokens to generate, at most."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Logits are divided by it; 0: the likeliest token. Default 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample among the likeliest tokens whose probabilities add up to it."""
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    """Sample among so many of the likeliest tokens; 0: among all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Sample among tokens that are at least so likely as this fraction of the likeliest."""
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    """Logits of tokens in the prompt or the text are divided by it."""
    frequency_penalty: Penalty | None = None
    """Subtracted from a token's logit for every time it is in the text."""
    presence_penalty: Penalty | None = None
    """Subtracted from the logit of every token in the text."""
    logit_bias: Annotated[dict[Id, Bias], Field(max_length=1024)] | None = None
    """Added to the logits of these token ids."""
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    """The same seed and settings give the same text."""
    n: Positive | None = None
    """Answers to each prompt; the server's --max_n is the limit."""
    stop: Annotated[list[Stop], Field(max_length=STOPS), BeforeValidator(_listed)] | None = None
    """Strings before which the text ends."""
    stream: bool | None = None
    """Whether the answer comes in pieces, as server-sent events."""
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    """Text, any JSON object, or JSON that fits a schema."""
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    """The text is one of these."""
    guided_regex: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """The text matches this expression."""
    service_tier: str | None = None
    """Every tier is served alike; the answer says "default"."""
    user: str | None = None
    """Ignored, as the next five."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: bool | None = None
    """Nothing is stored in any case."""

    @property
    def choices(self) -> int:
        """How many answers to a prompt."""
        return self.n or 1

    @property
    def texts(self) -> int:
        """How many texts are generated for a prompt, of which `choices` are answered."""
        return self.choices

    @property
    def limit(self) -> tuple[str, int | None]:
        """The field that says how many tokens at most, and what it says."""
        return "max_tokens", self.max_tokens

    @property
    def top(self) -> int | None:
        """How many likeliest tokens are reported beside each; None: no log probabilities."""
        return None

    @property
    def ignored(self) -> list[str]:
        """Fields that are accepted and have no effect, though they ask for something."""
        return []

    def check(self) -> None:
        """Raises Refused where fields do not fit each other."""
        if self.stream_options and not self.stream:
            raise Refused(400, "stream_options is for stream: true", param="stream_options")
        given = self.response_format
        if given and (given.type == "json_schema") != (given.json_schema is not None):
            raise Refused(
                400,
                "response_format.json_schema goes with type: json_schema, and only with it",
                param="response_format.json_schema",
            )
        guides = {
            "response_format": bool(given and given.type != "text"),
            "guided_choice": self.guided_choice is not None,
            "guided_regex": self.guided_regex is not None,
        }
        if len(names := [name for name, is_given in guides.items() if is_given]) > 1:
            raise Refused(400, f"{' and '.join(names)} exclude each other", param=names[1])

    def constraint(self, ends: tuple[int, ...]) -> Constraint | None:
        """What the text has to match before one of the token ids `ends`; None if nothing."""
        compile_: Callable[..., Guide]
        value: Any
        if self.guided_choice is not None:
            field, compile_, value = "guided_choice", choices, self.guided_choice
        elif self.guided_regex is not None:
            field, compile_, value = "guided_regex", regex, self.guided_regex
        elif self.response_format and self.response_format.type != "text":
            form = self.response_format.json_schema
            field, compile_ = "response_format", json_schema
            value = form.schema_ if form else {"type": "object"}
        else:
            return None
        return Constraint(field, compile_, json.dumps(value), ends)

    def sampling(self, choice: int, defaults: Mapping[str, Any]) -> Sampling:
        """The sampling settings of one of the texts; each has a seed of its own.

        `defaults` are the model's, for what the request does not say.
        """
        given = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        given["seed"] = secrets.randbelow(SEEDS) if self.seed is None else self.seed + choice
        given["seed"] %= SEEDS
        given = {name: value for name, value in given.items() if value is not None}
        return Sampling(**{**defaults, **given})


class CompletionBody(Asked):
    """The body of /v1/completions."""

    prompt: Texts
    """What is continued: text, token ids, or a list of either."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens to generate, at most; 0, with echo: the prompt is only scored. Default 16."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """Log-probabilities of the tokens, with so many of the likeliest ones beside each."""
    echo: bool | None = None
    """Whether the text begins with the prompt; with logprobs, its tokens are scored too."""
    best_of: Positive | None = None
    """Texts that are generated for each prompt, of which the n likeliest by token are answered."""
    add_special_tokens: bool | None = None
    """Whether a prompt of text begins as documents of the training data do, with the tokenizer's
    first token; by default the server's --add_special_tokens."""

    @property
    def texts(self) -> int:
        """See `Asked`."""
        return self.best_of or self.choices

    @property
    def top(self) -> int | None:
        """See `Asked`."""
        return self.logprobs

    def check(self) -> None:
        """Raises Refused where fields do not fit each other."""
        super().check()
        if self.texts < self.choices:
            raise Refused(
                400, f"best_of={self.best_of} is below n={self.n}; set it higher", param="best_of"
            )
        if self.stream and self.texts > self.choices:
            raise Refused(
                400,
                "best_of above n cannot be streamed: which texts are the best is known at the end",
                param="best_of",
            )


class Message(Body):
    """One turn of a conversation, in OpenAI's format."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    """Text, or a list of text parts; may be empty, and for the assistant null."""
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "Field required", {"field": "content"})
        return self

    def rendered(self) -> dict[str, Any]:
        """The message, as `jaxgpt.chat.render` takes it."""
        role = "system" if self.role == "developer" else self.role
        given = {
            "name": self.name,
            "tool_calls": self.tool_calls,
            "tool_call_id": self.tool_call_id,
        }
        return {
            "role": role,
            "content": self.content or "",
            **{name: value for name, value in given.items() if value},
        }


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatBody(Asked):
    """The body of /v1/chat/completions."""

    messages: Messages
    """The conversation; if the last message is the assistant's, its text is continued."""
    max_completion_tokens: Positive | None = None
    """Tokens to generate, at most; by default what the context has room for."""
    logprobs: bool | None = None
    """Whether the answer has the log-probabilities of its tokens."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """How many of the likeliest tokens are reported beside each."""
    tools: list[dict[str, Any]] | None = None
    """Accepted, but not shown to the model, which answers in text; the response's header
    x-jaxgpt-ignored says so."""
    tool_choice: str | dict[str, Any] | None = None
    """"auto" or "none"; a call cannot be required."""
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    """The older name of tools."""
    function_call: str | dict[str, Any] | None = None
    """The older name of tool_choice."""

    @property
    def limit(self) -> tuple[str, int | None]:
        """See `Asked`."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def top(self) -> int | None:
        """See `Asked`."""
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def ignored(self) -> list[str]:
        """See `Asked`."""
        return [name for name in ("tools", "functions") if getattr(self, name)]

    def check(self) -> None:
        """Raises Refused where fields do not fit each other."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(400, "top_logprobs is for logprobs: true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise Refused(
                400, "max_tokens and max_completion_tokens exclude each other", param="max_tokens"
            )
        for name in ("tool_choice", "function_call"):
            if getattr(self, name) not in (None, "auto", "none"):
                raise Refused(
                    400,
                    f"{name}: the model cannot be made to call a tool here; use auto or none, or "
                    "response_format with a JSON schema for structured output",
                    param=name,
                )


class EmbeddingBody(Body):
    """The body of /v1/embeddings."""

    model: str | None = None
    """The model's name, as /v1/models says it."""
    input: Annotated[Texts, AfterValidator(lambda texts: _at_most(INPUTS, texts))]
    """What is embedded: text, token ids, or a list of up to 2,048 of either."""
    encoding_format: Literal["float", "base64"] | None = None
    """Numbers, or the base64 of little-endian float32."""
    pooling: Literal["mean", "last"] | None = None
    """The mean of the last hidden states (default), or the last token's."""
    dimensions: Positive | None = None
    """The model's width, and nothing else."""
    user: str | None = None
    """Ignored."""


class TokenizeBody(Body):
    """The body of /tokenize: one of prompt (vLLM), content (llama.cpp) and messages."""

    model: str | None = None
    prompt: str | None = None
    """Text, which by default begins as documents do (vLLM's field)."""
    content: str | None = None
    """Text, by itself (llama.cpp's field)."""
    messages: Messages | None = None
    """A conversation, in the model's chat format, up to where the answer begins."""
    add_special_tokens: bool | None = None
    """Whether text begins as documents do; default true for prompt."""
    add_special: bool | None = None
    """The same under llama.cpp's name; default false for content."""
    return_token_strs: bool | None = None
    """Whether the answer has the tokens' texts as token_strs."""
    with_pieces: bool | None = None
    """Whether each token is an object of id and piece."""


class DetokenizeBody(Body):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[int]
    """Token ids; the answer has their text as prompt (vLLM) and content (llama.cpp)."""


def _at_most(most: int, values: list[Any]) -> list[Any]:
    if len(values) > most:
        raise ValueError(f"there are {len(values)}; give {most} at most")
    return values


B = TypeVar("B", bound=Body)


def parse(kind: type[B], content: bytes) -> B:
    """The body of a call; Refused names the first field that is invalid."""
    _check_json(content)
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = first["loc"] + tuple(filter(None, [first.get("ctx", {}).get("field")]))
        param = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in place)
        message = first["msg"].removeprefix("Value error, ")
        param = param[1:201]
        raise Refused(
            400, f"{param}: {message}" if param else message, param=param or None
        ) from None
    if isinstance(body, Asked):
        body.check()
    return body


def _check_json(content: bytes) -> None:
    """Raises Refused for what JSON parsers read in different ways, and for what is not JSON."""

    def distinct(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Refused(400, f"{key[:200]!r} is given twice; give it once", param=key[:200])
            seen.add(key)

    try:
        json.loads(content.decode(), object_pairs_hook=distinct)
    except RecursionError:
        raise Refused(400, "invalid JSON: it is nested too deep") from None
    except ValueError as error:
        raise Refused(400, f"invalid JSON: {error}") from None
