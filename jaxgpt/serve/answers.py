"""Converts the engine's output to OpenAI's responses: one JSON object, or server-sent events."""

import asyncio
import contextlib
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

from jaxgpt.serve.api import Call, ServedModel
from jaxgpt.serve.bodies import ApiError, JSONObject
from jaxgpt.serve.engine import Delta, Engine, Request, Stream, Token
from jaxgpt.serve.metrics import Metrics
from jaxgpt.tokenizer import TextDecoder

Place = tuple[bool, bool]
"""The return type of `Tokenizer.place`: how the next token of a text is spelled."""
PING = 15.0
"""Seconds without output after which a comment is sent to keep the client's connection open."""
FAILURES = {
    "deadline": (504, "the answer took longer than this server allows", "deadline_exceeded"),
    "cancelled": (503, "the server stopped before the answer was finished", "stopped"),
    "error": (500, "the model failed; the server's log says why", "model_failed"),
}


class ChoiceDelta(NamedTuple):
    """New output of one choice of a call."""

    choice: int
    delta: Delta


class Streams:
    """An asynchronous iterator over the output of all choices of one call.

    The queue between the engine's thread and the event loop needs no limit of its own: an answer
    is never longer than the context.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[Request], deadline: float, metrics: Metrics
    ) -> None:
        self._engine, self._metrics = engine, metrics
        self._start = time.monotonic()
        self._queue: asyncio.Queue[ChoiceDelta] = asyncio.Queue()
        self._streams: list[Stream] = []
        try:
            for choice, request in enumerate(requests):
                self._streams.append(engine.submit(request, self._listener(choice), deadline))
        except BaseException:
            self.cancel()
            raise

    def _listener(self, choice: int) -> Callable[[Delta], None]:
        loop = asyncio.get_running_loop()

        def put(delta: Delta) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed, so nobody reads
                loop.call_soon_threadsafe(self._queue.put_nowait, ChoiceDelta(choice, delta))

        return put

    async def __aiter__(self) -> AsyncIterator[ChoiceDelta | None]:
        """Yields output until all choices are finished, and None every `PING` seconds without any.

        Raises:
            ApiError: A choice failed, exceeded the deadline or was stopped.
        """
        left, first = len(self._streams), True
        while left:
            try:
                item = await asyncio.wait_for(self._queue.get(), PING)
            except TimeoutError:
                if not self._engine.alive:
                    raise ApiError(
                        503, "the model has stopped responding", code="stopped"
                    ) from None
                yield None
                continue
            tokens, finish = item.delta.tokens, item.delta.finish
            if first and tokens:
                self._metrics.first.observe(time.monotonic() - self._start)
                first = False
            if finish:
                self._metrics.finished.labels(finish).inc()
                left -= 1
            if finish in FAILURES:
                status, message, code = FAILURES[finish]
                raise ApiError(status, message, code=code)
            yield item
        self._metrics.total.observe(time.monotonic() - self._start)

    def cancel(self) -> None:
        """Cancels all choices that are not finished."""
        for stream in self._streams:
            stream.cancel()


class Answer(ABC):
    """Builds the response to one call from the engine's output."""

    prefix: ClassVar[str]
    """The prefix of the response's id."""
    kind: ClassVar[str]
    """The response's field `object`."""
    event_kind: ClassVar[str]
    """The field `object` of the events of a streamed response."""

    def __init__(self, call: Call, served: ServedModel) -> None:
        body, requests = call.body, call.requests
        self._body = body
        self._tokenizer = served.tokenizer
        self._requests = requests
        self._before = [request.prompt if request.continues else () for request in requests]
        for number, echo in enumerate(call.echoes):
            self._before[number] = requests[number].prompt[: echo.hidden]
        # How the next token of each text is spelled (see `Tokenizer.spell`).
        self._places = [served.tokenizer.place(before) for before in self._before]
        self._prompt_tokens = sum(len(request.prompt) for request in requests[:: body.texts])
        self._tokens = 0
        self._cached = [0] * len(requests)
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
            **({"service_tier": "default"} if body.service_tier is not None else {}),
        }

    async def response(self, streams: Streams) -> bytes:
        """Waits until all choices are finished, and returns the response as JSON."""
        deltas: list[list[Delta]] = [[] for _ in self._requests]
        async for item in streams:
            if item:
                deltas[item.choice].append(item.delta)
        # With log-probabilities the JSON can have megabytes, so it is built in a thread.
        return await asyncio.to_thread(self._response, deltas)

    def _response(self, deltas: list[list[Delta]]) -> bytes:
        texts = []
        for text, some in enumerate(deltas):
            tokens = tuple(token for delta in some for token in delta.tokens)
            self._tokens += len(tokens)
            first, last = some[0], some[-1]
            self._cached[text] = last.cached
            shown = "".join(delta.text for delta in some)
            texts.append((text, Delta(shown, tokens, last.finish, last.end, first.prompt)))
        choices: list[JSONObject] = []
        for start in range(0, len(texts), self._body.texts):
            for text, delta in self._best(texts[start : start + self._body.texts]):
                choices.append(
                    {
                        **self._choice(text, delta, self.message_field(text, delta)),
                        "index": len(choices),
                    }
                )
        return _json(
            {**self._head, "object": self.kind, "choices": choices, "usage": self._usage()}
        )

    def _best(self, texts: list[tuple[int, Delta]]) -> list[tuple[int, Delta]]:
        """Selects the texts to return for one prompt: those with the highest mean log-probability.

        The mean is over a text's tokens. All texts are returned unless `best_of` is above `n`.
        """
        if len(texts) == self._body.choices:
            return texts

        def mean(text: tuple[int, Delta]) -> float:
            tokens = [*text[1].tokens, *([text[1].end] if text[1].end else [])]
            return sum(token.logprob for token in tokens) / max(len(tokens), 1)

        return sorted(texts, key=mean, reverse=True)[: self._body.choices]

    async def events(self, streams: Streams) -> AsyncIterator[bytes]:
        """Yields the response as server-sent events; after a failure the last one is an error."""
        options = self._body.stream_options
        usage: JSONObject = {"usage": None} if options and options.include_usage else {}
        head = {**self._head, "object": self.event_kind}
        for opened in self.first_choices():
            yield _event({**head, "choices": [opened], **usage})
        try:
            async for item in streams:
                if item is None:
                    yield b": still here\n\n"
                    continue
                choice, delta = item
                self._tokens += len(delta.tokens)
                self._cached[choice] = delta.cached
                # A delta may have tokens and no text yet, if that may be part of a stop string.
                has_logprobs = (delta.tokens or delta.prompt) and self._body.top is not None
                if delta.text or delta.finish or has_logprobs:
                    shown = self._choice(choice, delta, self.delta_field(choice, delta))
                    yield _event({**head, "choices": [shown], **usage})
        except ApiError as error:
            yield _event(error.body)
            return
        if usage:
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def first_choices(self) -> list[JSONObject]:
        """The choices of the events that are sent before any text is generated."""
        return []

    @abstractmethod
    def message_field(self, choice: int, delta: Delta) -> JSONObject:
        """The field that holds the text of a complete choice, such as `message`."""

    @abstractmethod
    def delta_field(self, choice: int, delta: Delta) -> JSONObject:
        """The field that holds the new text in a streamed choice, such as `delta`."""

    @abstractmethod
    def logprobs(self, choice: int, delta: Delta) -> JSONObject:
        """The field `logprobs` for a delta's tokens.

        Must be called for a choice's deltas in order: how a token is spelled depends on the one
        before it.
        """

    def _choice(self, choice: int, delta: Delta, text: Mapping[str, object]) -> JSONObject:
        return {
            "index": choice,
            **text,
            "logprobs": None if self._body.top is None else self.logprobs(choice, delta),
            "finish_reason": delta.finish or None,
        }

    def _place(self, choice: int, id: int) -> Place:
        """Returns how the next token of a text is spelled, and advances past that token, `id`."""
        place = self._places[choice]
        self._places[choice] = False, id in self._tokenizer.spaced
        return place

    def _token_bytes(self, id: int, place: Place) -> bytes:
        return self._tokenizer.spell([id], *place)[0]

    def _usage(self) -> JSONObject:
        cached = sum(self._cached[:: self._body.texts])  # each prompt counts once, as above
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class Completion(Answer):
    """The response of /v1/completions."""

    prefix = "cmpl"
    kind = event_kind = "text_completion"

    def __init__(self, call: Call, served: ServedModel) -> None:
        super().__init__(call, served)
        self._echoes = call.echoes
        self._decoders = [TextDecoder(served.tokenizer, before) for before in self._before]
        self._offsets = [0] * len(call.requests)

    def first_choices(self) -> list[JSONObject]:
        """With `echo`, the prompts, unless they are sent later, with their log-probabilities."""
        if not self._echoes or self._body.top is not None:
            return []
        return [
            self._choice(choice, Delta(""), {"text": echo.text})
            for choice, echo in enumerate(self._echoes)
        ]

    def message_field(self, choice: int, delta: Delta) -> JSONObject:
        """See `Answer`; with `echo` the text begins with the prompt."""
        before = self._echoes[choice].text if self._echoes else ""
        return {"text": before + delta.text}

    def delta_field(self, choice: int, delta: Delta) -> JSONObject:
        """See `Answer`; the prompt is in the first delta if scored, else in `first_choices`."""
        return self.message_field(choice, delta) if delta.prompt else {"text": delta.text}

    def logprobs(self, choice: int, delta: Delta) -> JSONObject:
        """See `Answer`; the layout is OpenAI's.

        `text_offset` is the number of characters before a token in the choice's text. With `echo`
        the prompt's tokens come first, and the log-probability of the first of these is null. The
        token that ended the text comes last, though the text does not include it.
        """
        tokens: list[Token | None] = [*delta.tokens, *([delta.end] if delta.end else [])]
        ids = [token.id for token in tokens if token]
        if delta.prompt and self._echoes:
            hidden = self._echoes[choice].hidden
            ids = [*self._requests[choice].prompt[hidden:], *ids]
            # As in OpenAI's API, the first visible token has null, also after a hidden one.
            echoed = [None, *delta.prompt.tokens][hidden:]
            tokens = [*([None] if echoed else []), *echoed[1:], *tokens]
        offsets, names, top = [], [], []
        for id, token in zip(ids, tokens, strict=True):
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(self._decoders[choice].decode([id]))
            place = self._place(choice, id)
            names.append(_name(self._token_bytes(id, place)))
            top.append(token and self._top_logprobs(token, place))
        return {
            "tokens": names,
            "token_logprobs": [token and _number(token.logprob) for token in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _top_logprobs(self, token: Token, place: Place) -> dict[str, float]:
        """Texts and log-probabilities of the top tokens and of the sampled token itself."""
        found: dict[str, float] = {}
        for id, logprob in (*token.top, (token.id, token.logprob)):
            found.setdefault(_name(self._token_bytes(id, place)), _number(logprob))
        return found


class Chat(Answer):
    """The response of /v1/chat/completions."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    event_kind = "chat.completion.chunk"

    def first_choices(self) -> list[JSONObject]:
        """A first event for each choice, which has the role and no text."""
        role = {"delta": {"role": "assistant", "content": ""}}
        return [self._choice(choice, Delta(""), role) for choice in range(len(self._requests))]

    def message_field(self, choice: int, delta: Delta) -> JSONObject:
        """See `Answer`."""
        return {"message": {"role": "assistant", "content": delta.text, "refusal": None}}

    def delta_field(self, choice: int, delta: Delta) -> JSONObject:
        """See `Answer`."""
        return {"delta": {"content": delta.text} if delta.text else {}}

    def logprobs(self, choice: int, delta: Delta) -> JSONObject:
        """See `Answer`."""
        content = []
        for token in delta.tokens:
            place = self._place(choice, token.id)
            top = [self._token(id, logprob, place) for id, logprob in token.top]
            content.append({**self._token(token.id, token.logprob, place), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float, place: Place) -> JSONObject:
        content = self._token_bytes(id, place)
        text = content.decode(errors="replace")
        return {"token": text, "logprob": _number(logprob), "bytes": list(content)}


def _name(content: bytes) -> str:
    """A token's text, in OpenAI's notation `bytes:\\x..` if its bytes are not valid UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _number(logprob: float) -> float:
    """A log-probability for JSON, which has no infinity: -9999 instead, as in OpenAI's API."""
    return max(logprob, -9999.0)


def _json(values: Mapping[str, object]) -> bytes:
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _event(values: Mapping[str, object]) -> bytes:
    return b"data: %s\n\n" % _json(values)
