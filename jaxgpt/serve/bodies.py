"""Request bodies: strict JSON, validated by one pydantic model for each path.

A field that is unknown, duplicate, of the wrong type or out of range is an error that names the
field; nothing is cast, clipped or truncated. A field of OpenAI's or vLLM's API that this server
does not support is accepted if its value has no effect: null, [], {} and the values in `NEUTRAL`.
"""

import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Literal, TypeGuard, TypeVar

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

from jaxgpt.generation.config import GenerationConfig
from jaxgpt.generation.sampling import SEEDS, Sampling
from jaxgpt.serve.constraints import Constraint

T = TypeVar("T")
JSONObject = dict[str, object]
"""A JSON object: its values are JSON, too."""

CONSTRAINTS = {"choices": "guided_choice", "regex": "guided_regex", "schema": "response_format"}
"""The fields that set the constraints of `GenerationConfig`."""
STOPS = 16
"""The most stop strings of a request."""
INPUTS = 2048
"""The most inputs of one call of /v1/embeddings."""
NEUTRAL: dict[str, tuple[object, ...]] = {
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
"""Fields that are not supported, with the values that request the behavior this server has."""


class ApiError(Exception):
    """An error response: an HTTP status and the body of an error object of OpenAI's API.

    Args:
        status: The HTTP status.
        message: What is wrong and what to do instead.
        param: The request's invalid field.
        code: A stable name of the error.
        headers: Extra response headers.
    """

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


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _joined(value: object) -> object:
    """Joins a message's list of text parts to one string; other values are returned unchanged."""
    if not isinstance(value, list):
        return value
    texts = [part.get("text") for part in value if isinstance(part, dict)]
    parts = [{"type": "text", "text": text} for text in texts if isinstance(text, str)]
    if parts != value:
        raise ValueError('use a string, or a list of parts {"type": "text", "text": ...}')
    return "".join(part["text"] for part in parts)


def _finite(value: T) -> T:
    """Raises ValueError if JSON contains a number that is out of the range of a double."""

    def check(number: str) -> float:
        if not math.isfinite(double := float(number)):
            raise ValueError(f"the number {number[:20]}... is too large")
        return double

    json.loads(json.dumps(value, allow_nan=False), parse_int=check)
    return value


def _id(key: str) -> int:
    """Parses a token id; unlike int(), it rejects " 1", "+1", "01" and "1_0"."""
    if not re.fullmatch("0|-?[1-9][0-9]*", key):
        raise ValueError('use a token id in decimal digits, such as "42"')
    return int(key)


def _texts(value: object) -> list[str | list[int]]:
    """Converts one text or several, each a string or token ids, to a list."""
    texts = [value] if isinstance(value, str) or (_are(value, int) and value) else value
    if texts and (
        _are(texts, str) or (_are(texts, list) and all(x and _are(x, int) for x in texts))
    ):
        return [*texts]
    raise ValueError("use a string, strings, token ids, or non-empty lists of token ids")


def _are(values: object, kind: type[T]) -> TypeGuard[list[T]]:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _is_neutral(name: str, value: object) -> bool:
    """Whether the value of an unsupported field has no effect, see `NEUTRAL`."""
    is_bool = isinstance(value, bool)
    return value in (None, [], {}) or any(
        value == each and isinstance(each, bool) == is_bool for each in NEUTRAL.get(name, ())
    )


def _list(items: Mapping[str, object]) -> JSONObject:
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
    """A JSON object whose values are not cast, without unknown fields that would have an effect."""

    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="after")
    def _check_others(self) -> "Body":
        for name, value in (self.model_extra or {}).items():
            if not _is_neutral(name, value):
                raise PydanticCustomError(
                    "unsupported", "not supported by this server; remove it", {"field": name}
                )
        return self


class StreamOptions(Body):
    """Options of a streamed response."""

    include_usage: bool = False
    """Whether a last event reports the token counts."""


class JSONSchema(Body):
    """A JSON schema that the answer must match."""

    name: str = ""
    description: str | None = None
    schema_: Annotated[JSONObject, Field(alias="schema"), AfterValidator(_finite)]
    strict: bool | None = None


class ResponseFormat(Body):
    """Any text, any JSON object (nested up to `constrained.DEPTH`), or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class RequestBody(Body):
    """The fields that completions and chat completions share; null is the same as no value."""

    model: str | None = None
    """The model's name, as listed by /v1/models."""
    max_tokens: Positive | None = None
    """The most tokens to generate."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Logits are divided by it; 0: always the most likely token (greedy). Default 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus sampling: sample from the most likely tokens whose probabilities sum to this."""
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    """Sample from this many of the most likely tokens; 0: from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Sample from tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    """Reduces the logits of tokens that are in the prompt or the text; 1: off."""
    frequency_penalty: Penalty | None = None
    """Subtracted from a token's logit for each of its occurrences in the text."""
    presence_penalty: Penalty | None = None
    """Subtracted once from the logit of every token that is in the text."""
    logit_bias: Annotated[dict[Id, Bias], Field(max_length=1024)] | None = None
    """A number to add to the logit, for each token id."""
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    """The random seed: the same seed and settings give the same text. Default: random."""
    n: Positive | None = None
    """The number of answers to each prompt, up to the server's --max_n."""
    stop: Annotated[list[Stop], Field(max_length=STOPS), BeforeValidator(_listed)] | None = None
    """Stop strings: the text ends before the first of them."""
    stream: bool | None = None
    """Whether the answer is streamed, as server-sent events."""
    stream_options: StreamOptions | None = None
    """Options of a streamed answer."""
    response_format: ResponseFormat | None = None
    """Constrains the answer to any JSON object, or to JSON that fits a schema."""
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    """Constrains the answer to one of these strings."""
    guided_regex: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Constrains the answer to match this regular expression."""
    service_tier: str | None = None
    """Has no effect; the response says "default"."""
    user: str | None = None
    """Ignored, as are the next five fields."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: bool | None = None
    """Ignored: the server never stores requests or answers."""

    @property
    def choices(self) -> int:
        """The number of answers to each prompt."""
        return self.n or 1

    @property
    def texts(self) -> int:
        """The number of texts to generate per prompt; the best `choices` of them are returned."""
        return self.choices

    @property
    def limit(self) -> tuple[str, int | None]:
        """The name of the field that limits the tokens to generate, and its value."""
        return "max_tokens", self.max_tokens

    @property
    def top(self) -> int | None:
        """The number of top log-probabilities per token; None: no log-probabilities at all."""
        return None

    @property
    def ignored(self) -> list[str]:
        """The request's fields that are accepted but ignored, for the header x-jaxgpt-ignored."""
        return []

    def check(self) -> None:
        """Raises ApiError if fields contradict each other."""
        if self.stream_options and not self.stream:
            raise ApiError(
                400,
                "stream_options needs stream: true; set stream, or remove stream_options",
                param="stream_options",
            )
        given = self.response_format
        if given and (given.type == "json_schema") != (given.json_schema is not None):
            raise ApiError(
                400,
                "response_format.json_schema is required for type: json_schema, and invalid for "
                "other types",
                param="response_format.json_schema",
            )
        guides = {
            "response_format": bool(given and given.type != "text"),
            "guided_choice": self.guided_choice is not None,
            "guided_regex": self.guided_regex is not None,
        }
        if len(names := [name for name, is_given in guides.items() if is_given]) > 1:
            raise ApiError(
                400, f"{' and '.join(names)} cannot be combined; use one of them", param=names[1]
            )

    def config(self, choice: int = 0) -> GenerationConfig:
        """The options of generation that the request has.

        Args:
            choice: The number of the text; it is added to the seed, so that texts differ.
        """
        given = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        seed = secrets.randbelow(SEEDS) if self.seed is None else self.seed + choice
        given["seed"] = seed % SEEDS
        form, schema = self.response_format, None
        if form and form.type != "text":
            schema = form.json_schema.schema_ if form.json_schema else {"type": "object"}
        return GenerationConfig(
            stop=tuple(self.stop or ()),
            choices=tuple(self.guided_choice or ()),
            regex=self.guided_regex or "",
            schema=schema,
            **{name: value for name, value in given.items() if value is not None},
        )

    def constraint(self, ends: tuple[int, ...]) -> Constraint | None:
        """The constraint on the text before one of the end tokens `ends`; None: there is none."""
        if (constraint := self.config().constraint) is None:
            return None
        name, compile_, value = constraint
        return Constraint(CONSTRAINTS[name], compile_, json.dumps(value), ends)


class CompletionBody(RequestBody):
    """The body of /v1/completions."""

    prompt: Texts
    """The text to continue: a string, token ids, or a list of either."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """The most tokens to generate; 0 with echo only scores the prompt. Default 16."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """Report log-probabilities of the tokens, and this many top log-probabilities for each."""
    echo: bool | None = None
    """Whether the text begins with the prompt; with logprobs, the prompt's tokens are scored."""
    best_of: Positive | None = None
    """Generate this many texts per prompt, and return the n with the highest mean log-probability
    per token."""
    add_special_tokens: bool | None = None
    """Whether a text prompt begins with the tokenizer's beginning-of-document token, as training
    documents do. Default: the server's --add_special_tokens."""

    @property
    def texts(self) -> int:
        """See `RequestBody`."""
        return self.best_of or self.choices

    @property
    def top(self) -> int | None:
        """See `RequestBody`."""
        return self.logprobs

    def check(self) -> None:
        """Raises ApiError if fields contradict each other."""
        super().check()
        if self.texts < self.choices:
            raise ApiError(
                400,
                f"best_of={self.best_of} is less than n={self.n}; use {self.n} or more",
                param="best_of",
            )
        if self.stream and self.texts > self.choices:
            raise ApiError(
                400,
                "best_of above n cannot be streamed: the best texts are known only at the end; "
                "remove best_of or stream",
                param="best_of",
            )


class Message(Body):
    """One message of a conversation, in OpenAI's format."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    """A string or a list of text parts; may be empty, and null for the assistant."""
    name: str | None = None
    tool_calls: list[JSONObject] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "Field required", {"field": "content"})
        return self

    def rendered(self) -> JSONObject:
        """Converts the message to the format of `jaxgpt.chat.render`."""
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


class ChatBody(RequestBody):
    """The body of /v1/chat/completions."""

    messages: Messages
    """The conversation. If the last message is the assistant's, the model continues its text."""
    max_completion_tokens: Positive | None = None
    """The most tokens to generate. Default: as many as fit in the context."""
    logprobs: bool | None = None
    """Whether to report the log-probabilities of the answer's tokens."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """The number of top log-probabilities to report for each token."""
    tools: list[JSONObject] | None = None
    """Accepted but ignored: the model does not see them and answers in text. The response header
    x-jaxgpt-ignored says so."""
    tool_choice: str | JSONObject | None = None
    """"auto" or "none"; a tool call cannot be required."""
    parallel_tool_calls: bool | None = None
    functions: list[JSONObject] | None = None
    """The deprecated name of tools."""
    function_call: str | JSONObject | None = None
    """The deprecated name of tool_choice."""

    @property
    def limit(self) -> tuple[str, int | None]:
        """See `RequestBody`."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def top(self) -> int | None:
        """See `RequestBody`."""
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def ignored(self) -> list[str]:
        """See `RequestBody`."""
        return [name for name in ("tools", "functions") if getattr(self, name)]

    def check(self) -> None:
        """Raises ApiError if fields contradict each other."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(
                400,
                "top_logprobs needs logprobs: true; set logprobs, or remove top_logprobs",
                param="top_logprobs",
            )
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError(
                400,
                "max_tokens and max_completion_tokens cannot be combined; use one of them",
                param="max_tokens",
            )
        for name in ("tool_choice", "function_call"):
            if getattr(self, name) not in (None, "auto", "none"):
                raise ApiError(
                    400,
                    f"{name}: this server cannot make the model call a tool; use auto or none, "
                    "or response_format with a JSON schema for structured output",
                    param=name,
                )


class EmbeddingBody(Body):
    """The body of /v1/embeddings."""

    model: str | None = None
    """The model's name, as listed by /v1/models."""
    input: Annotated[Texts, AfterValidator(lambda texts: _at_most(INPUTS, texts))]
    """The text to embed: a string, token ids, or a list of up to 2,048 of either."""
    encoding_format: Literal["float", "base64"] | None = None
    """A list of numbers (default), or base64 of little-endian float32."""
    pooling: Literal["mean", "last"] | None = None
    """The mean of all tokens' last hidden states (default), or the last token's."""
    dimensions: Positive | None = None
    """The embedding's size; only the model's width is supported."""
    user: str | None = None
    """Ignored."""


class TokenizeBody(Body):
    """The body of /tokenize: exactly one of prompt (vLLM), content (llama.cpp) and messages."""

    model: str | None = None
    prompt: str | None = None
    """Text; by default with the beginning-of-document token before it (vLLM's field)."""
    content: str | None = None
    """Text; by default without a special token before it (llama.cpp's field)."""
    messages: Messages | None = None
    """A conversation; it is rendered in the model's chat format, up to where the answer begins."""
    add_special_tokens: bool | None = None
    """Whether to begin with the beginning-of-document token. Default: true for prompt, false for
    content."""
    add_special: bool | None = None
    """llama.cpp's name of add_special_tokens."""
    return_token_strs: bool | None = None
    """Whether to return the tokens' texts as token_strs."""
    with_pieces: bool | None = None
    """Whether to return each token as an object with id and piece."""


class DetokenizeBody(Body):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[int]
    """Token ids; the response has their text as prompt (vLLM) and as content (llama.cpp)."""


def _at_most(most: int, values: list[T]) -> list[T]:
    if len(values) > most:
        raise ValueError(f"{len(values)} values are too many; use {most} or less")
    return values


B = TypeVar("B", bound=Body)


def parse(kind: type[B], content: bytes) -> B:
    """Parses and validates a call's body.

    Args:
        kind: The class of the body.
        content: The body's JSON.

    Raises:
        ApiError: The body is invalid; the message names the first invalid field.
    """
    _check_json(content)
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = first["loc"] + tuple(filter(None, [first.get("ctx", {}).get("field")]))
        param = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in place)
        message = first["msg"].removeprefix("Value error, ")
        param = param[1:201]
        raise ApiError(
            400, f"{param}: {message}" if param else message, param=param or None
        ) from None
    if isinstance(body, RequestBody):
        body.check()
    return body


def _check_json(content: bytes) -> None:
    """Raises ApiError for invalid JSON, and for duplicate keys, which parsers treat differently."""

    def distinct(pairs: list[tuple[str, object]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ApiError(
                    400, f"the key {key[:200]!r} appears twice; use it once", param=key[:200]
                )
            seen.add(key)

    try:
        json.loads(content.decode(), object_pairs_hook=distinct)
    except RecursionError:
        raise ApiError(400, "invalid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"invalid JSON: {error}") from None
