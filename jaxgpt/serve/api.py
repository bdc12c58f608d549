"""OpenAI's request bodies: strict JSON, validated, and the engine's requests that they become.

What it promises: a field that is unknown, given twice, of another type or out of range is refused
by its name, and so is a prompt or an answer that does not fit; nothing is cast, clipped or cut.
"""

import json
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)

from jaxgpt.chat import Template, render
from jaxgpt.errors import InputError
from jaxgpt.guide import Guide, choices, json_schema, regex
from jaxgpt.pretrained.generation import end_ids
from jaxgpt.pretrained.generation import sampling as sampling_defaults
from jaxgpt.sampling import Sampling
from jaxgpt.serve.constraints import Constraint
from jaxgpt.serve.engine import Request
from jaxgpt.tokenizer import Tokenizer

PROMPTS = 16
"""Of one call, at most."""
SEEDS = 1 << 63


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


def _prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several, as text or as ids."""
    prompts = [value] if isinstance(value, str) or (_are(int, value) and value) else value
    texts = _are(str, prompts)
    if not prompts or not (
        texts or (_are(list, prompts) and all(x and _are(int, x) for x in prompts))
    ):
        raise ValueError("give text, texts, token ids, or lists of token ids, and none without one")
    if len(prompts) > PROMPTS:
        raise ValueError(f"there are {len(prompts)} prompts; give {PROMPTS} at most")
    return prompts


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


Positive = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Id = Annotated[int, BeforeValidator(_id)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """Fields of JSON, none of them cast, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """Of an answer in pieces."""

    include_usage: bool = False


class JSONSchema(Body):
    """What a JSON answer has to look like."""

    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema"), AfterValidator(_finite)]
    strict: bool | None = None


class ResponseFormat(Body):
    """Text, a JSON object, or JSON that fits a schema; of an object see `jaxgpt.guide.DEPTH`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class Asked(Body):
    """What both ways of asking have in common; a field that is null is as one left out."""

    model: str | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[Id, Bias], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    n: Annotated[int, Field(ge=1, le=4)] | None = None
    stop: (
        Annotated[list[Stop], Field(min_length=1, max_length=4), BeforeValidator(_listed)] | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    guided_regex: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    user: str | None = None

    @property
    def choices(self) -> int:
        """How many answers to a prompt."""
        return self.n or 1

    @property
    def limit(self) -> tuple[str, int | None]:
        """The field that says how many tokens at most, and what it says."""
        return "max_tokens", self.max_tokens

    @property
    def top(self) -> int | None:
        """How many likeliest tokens are reported beside each; None: no log probabilities."""
        return None

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
        """The sampling settings of one of the choices; each has a seed of its own.

        `defaults` are the model's, for what the request does not say.
        """
        given = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        given["seed"] = secrets.randbelow(SEEDS) if self.seed is None else self.seed + choice
        given["seed"] %= SEEDS
        given = {name: value for name, value in given.items() if value is not None}
        return Sampling(**{**defaults, **given})


class CompletionBody(Asked):
    """The body of /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def top(self) -> int | None:
        """See `Asked`."""
        return self.logprobs


class Message(Body):
    """One turn; what clients add to an answer they send back must be null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(min_length=1), BeforeValidator(_joined)]
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class ChatBody(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

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

    def check(self) -> None:
        """Raises Refused where fields do not fit each other."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(400, "top_logprobs is for logprobs: true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise Refused(
                400, "max_tokens and max_completion_tokens exclude each other", param="max_tokens"
            )


B = TypeVar("B", bound=Asked)


def parse(kind: type[B], content: bytes) -> B:
    """The body of a call; Refused names the first field that cannot be."""
    _check_json(content)
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "not supported here; leave it out"
        param = param[1:201]
        raise Refused(
            400, f"{param}: {message}" if param else message, param=param or None
        ) from None
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


@dataclass(frozen=True)
class Served:
    """The model that is asked."""

    name: str
    tokenizer: Tokenizer
    context: int
    """A prompt and its answer together have no more tokens."""
    template: Template | None
    """The format of its conversations; None: it has not been trained for any."""
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    """The model's own: its end tokens end every text, and its sampling settings are those of a
    request that does not give its own."""

    def completion(self, content: bytes) -> "Call":
        """A call of /v1/completions, with a request for each choice of each prompt, in order."""
        body = parse(CompletionBody, content)
        self.check_name(body.model)
        prompts = [self._ids(prompt) for prompt in body.prompt]
        ends = [self.tokenizer.eot, self.tokenizer.eos, *end_ids(self.generation_config)]
        # 16 is OpenAI's.
        return self._call(body, prompts, ends, "prompt", default=16)

    def chat(self, content: bytes) -> "Call":
        """A call of /v1/chat/completions, with a request for each choice."""
        body = parse(ChatBody, content)
        self.check_name(body.model)
        if self.template is None:
            raise Refused(
                400,
                f"{self.name} has no chat format: it goes on from a text; use /v1/completions, or "
                "serve a model that was trained on conversations",
                code="no_chat_format",
            )
        roles = {"developer": "system"}
        messages = [
            {"role": roles.get(message.role, message.role), "content": message.content}
            for message in body.messages
        ]
        try:
            prompt = render(self.template, self.tokenizer, messages, open=True).tokens
        except InputError as error:
            raise Refused(400, f"messages: {error}", param="messages") from None
        ends = [*self.template.stops(self.tokenizer), *end_ids(self.generation_config)]
        return self._call(body, [prompt], ends, "messages", default=self.context, continues=False)

    def check_name(self, model: str | None) -> None:
        """Raises Refused where it is another model's."""
        if model not in (None, self.name):
            raise Refused(
                404,
                f"there is no model {model[:200]!r} here; the one there is is {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def _ids(self, prompt: str | list[int]) -> list[int]:
        """A prompt, as documents begin; ids as they are."""
        if isinstance(prompt, str):
            try:
                text = self.tokenizer.encode(prompt)
            except InputError as error:
                raise Refused(400, f"prompt: {error}", param="prompt") from None
            return [*self.tokenizer.prefix, *text] or [self.tokenizer.eot]
        for token in prompt:
            if not 0 <= token < self.tokenizer.vocab_size:
                raise Refused(
                    400,
                    f"prompt: there is no token {token}; ids are 0 to "
                    f"{self.tokenizer.vocab_size - 1}",
                    param="prompt",
                )
        return prompt

    def _call(
        self,
        body: Asked,
        prompts: Sequence[list[int]],
        ends: Sequence[int],
        param: str,
        default: int,
        continues: bool = True,
    ) -> "Call":
        rooms = [self._tokens(body, len(prompt), param, default) for prompt in prompts]
        stop_ids = tuple(dict.fromkeys(ends))
        constraint = body.constraint(stop_ids)
        if constraint and not continues:
            constraint = constraint._replace(context=())
        never = [id for id, bias in (body.logit_bias or {}).items() if bias <= -100]
        if never and (constraint or len(never) >= self.tokenizer.vocab_size):
            raise Refused(
                400,
                "logit_bias of -100 may leave no token to draw; leave it out, or set it to -99",
                param="logit_bias",
            )
        requests = []
        for prompt, tokens in zip(prompts, rooms, strict=True):
            for choice in range(body.choices):
                sampling = body.sampling(choice, sampling_defaults(self.generation_config))
                try:
                    sampling.check(self.tokenizer.vocab_size)
                except InputError as error:
                    raise Refused(400, str(error), param=str(error).split()[0]) from None
                requests.append(
                    Request(
                        prompt=tuple(prompt),
                        tokens=tokens,
                        sampling=sampling,
                        stops=tuple(body.stop or ()),
                        stop_ids=stop_ids,
                        continues=continues,
                        top_logprobs=body.top or 0,
                    )
                )
        return Call(body, requests, constraint)

    def _tokens(self, body: Asked, prompt: int, param: str, default: int) -> int:
        """How many tokens are written at most; Refused where they do not fit."""
        room = self.context - prompt
        if room < 1:
            raise Refused(
                400,
                f"{param}: {prompt} tokens, and the answer, do not fit the model's context of "
                f"{self.context}; make it shorter",
                param=param,
                code="context_length_exceeded",
            )
        field, asked = body.limit
        if asked is not None and asked > room:
            raise Refused(
                400,
                f"{field}={min(asked, 10**9)} after a prompt of {prompt} tokens does not fit the "
                f"model's context of {self.context}; set it to {room} at most",
                param=field,
                code="context_length_exceeded",
            )
        return min(default, room) if asked is None else asked


class Call(NamedTuple):
    """A call that was parsed and found valid, but for its constraint."""

    body: Asked
    requests: list[Request]
    """One for each choice of each prompt, in order, without the constraint."""
    constraint: Constraint | None
    """What the text of all of them has to match."""
