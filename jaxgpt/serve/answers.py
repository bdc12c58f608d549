"""Pieces of text from the engine's thread to OpenAI's answers, whole or as events."""

import asyncio
import contextlib
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from jaxgpt.serve.api import Call, Served
from jaxgpt.serve.bodies import Refused
from jaxgpt.serve.engine import Engine, Piece, Request, Stream, Token
from jaxgpt.serve.metrics import Metrics
from jaxgpt.tokenizer import TextDecoder

Place = tuple[bool, bool]
"""What `Tokenizer.place` gives."""
PING = 15.0
"""Seconds without a piece after which a reader is told that somebody is still there."""
FAILURES = {
    "deadline": (504, "the answer took longer than this server allows", "deadline_exceeded"),
    "cancelled": (503, "the server stopped before the answer was finished", "stopped"),
    "error": (500, "the model failed; the server's log says why", "model_failed"),
}


class Written(NamedTuple):
    """A piece, and which of a call's choices it belongs to."""

    choice: int
    piece: Piece


class Streams:
    """The choices of one call, as they are written, for one task of the running loop.

    Pieces that wait to be read are bounded by the answers themselves, which end with the context.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[Request], deadline: float, metrics: Metrics
    ) -> None:
        self._engine, self._metrics = engine, metrics
        self._start = time.monotonic()
        self._queue: asyncio.Queue[Written] = asyncio.Queue()
        self._streams: list[Stream] = []
        try:
            for choice, request in enumerate(requests):
                self._streams.append(engine.submit(request, self._listener(choice), deadline))
        except BaseException:
            self.cancel()
            raise

    def _listener(self, choice: int) -> Callable[[Piece], None]:
        loop = asyncio.get_running_loop()

        def put(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the reader
                loop.call_soon_threadsafe(self._queue.put_nowait, Written(choice, piece))

        return put

    async def __aiter__(self) -> AsyncIterator[Written | None]:
        """What is written, until all choices are finished; None now and then while nothing is.

        Raises Refused where one cannot be finished.
        """
        left, first = len(self._streams), True
        while left:
            try:
                written = await asyncio.wait_for(self._queue.get(), PING)
            except TimeoutError:
                if not self._engine.alive:
                    raise Refused(503, "the model has stopped writing", code="stopped") from None
                yield None
                continue
            tokens, finish = written.piece.tokens, written.piece.finish
            if first and tokens:
                self._metrics.first.add(time.monotonic() - self._start)
                first = False
            if finish:
                self._metrics.finished[finish] += 1
                left -= 1
            if finish in FAILURES:
                status, message, code = FAILURES[finish]
                raise Refused(status, message, code=code)
            yield written
        self._metrics.total.add(time.monotonic() - self._start)

    def cancel(self) -> None:
        """Lets go of all that is not finished."""
        for stream in self._streams:
            stream.cancel()


class Answer(ABC):
    """One call's answer in the making."""

    prefix: ClassVar[str]
    """Of its id."""
    kind: ClassVar[str]
    """Its `object`."""
    event_kind: ClassVar[str]
    """The `object` of its events."""

    def __init__(self, call: Call, served: Served) -> None:
        body, requests = call.body, call.requests
        self._body = body
        self._tokenizer = served.tokenizer
        self._requests = requests
        self._before = [request.prompt if request.continues else () for request in requests]
        for number, echo in enumerate(call.echoes):
            self._before[number] = requests[number].prompt[: echo.hidden]
        # How the next token of each text is spelled, see `Tokenizer.spell`.
        self._places = [served.tokenizer.place(before) for before in self._before]
        self._prompt_tokens = sum(len(request.prompt) for request in requests[:: body.texts])
        self._tokens = 0
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
            **({"service_tier": "default"} if body.service_tier is not None else {}),
        }

    async def whole(self, streams: Streams) -> bytes:
        """The whole answer as JSON, once it is finished."""
        pieces: list[list[Piece]] = [[] for _ in self._requests]
        async for written in streams:
            if written:
                pieces[written.choice].append(written.piece)
        return await asyncio.to_thread(self._whole, pieces)  # megabytes, with log probabilities

    def _whole(self, pieces: list[list[Piece]]) -> bytes:
        texts = []
        for text, some in enumerate(pieces):
            tokens = tuple(token for piece in some for token in piece.tokens)
            self._tokens += len(tokens)
            first, last = some[0], some[-1]
            shown = "".join(piece.text for piece in some)
            texts.append((text, Piece(shown, tokens, last.finish, last.end, first.prompt)))
        choices: list[dict[str, Any]] = []
        for start in range(0, len(texts), self._body.texts):
            for text, piece in self._best(texts[start : start + self._body.texts]):
                choices.append(
                    {**self._choice(text, piece, self.said(text, piece)), "index": len(choices)}
                )
        return _json(
            {**self._head, "object": self.kind, "choices": choices, "usage": self._usage()}
        )

    def _best(self, texts: list[tuple[int, Piece]]) -> list[tuple[int, Piece]]:
        """Of one prompt's texts those that are answered: the likeliest by token, if not all."""
        if len(texts) == self._body.choices:
            return texts

        def mean(text: tuple[int, Piece]) -> float:
            tokens = [*text[1].tokens, *([text[1].end] if text[1].end else [])]
            return sum(token.logprob for token in tokens) / max(len(tokens), 1)

        return sorted(texts, key=mean, reverse=True)[: self._body.choices]

    async def events(self, streams: Streams) -> AsyncIterator[bytes]:
        """All of it as server-sent events; where it fails, the last of them says why."""
        options = self._body.stream_options
        usage: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        head = {**self._head, "object": self.event_kind}
        for opened in self.opening():
            yield _event({**head, "choices": [opened], **usage})
        try:
            async for written in streams:
                if written is None:
                    yield b": still here\n\n"
                    continue
                choice, piece = written
                self._tokens += len(piece.tokens)
                # Text may be held back where a stop string may be beginning.
                told = (piece.tokens or piece.prompt) and self._body.top is not None
                if piece.text or piece.finish or told:
                    said = self._choice(choice, piece, self.added(choice, piece))
                    yield _event({**head, "choices": [said], **usage})
        except Refused as refused:
            yield _event(refused.body)
            return
        if usage:
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def opening(self) -> list[dict[str, Any]]:
        """The choices of the events that come before anything is written."""
        return []

    @abstractmethod
    def said(self, choice: int, piece: Piece) -> dict[str, Any]:
        """A whole choice's own field."""

    @abstractmethod
    def added(self, choice: int, piece: Piece) -> dict[str, Any]:
        """The same of an event's choice."""

    @abstractmethod
    def logprobs(self, choice: int, piece: Piece) -> dict[str, Any]:
        """Log probabilities of a piece's tokens, the next ones of a choice."""

    def _choice(self, choice: int, piece: Piece, said: dict[str, Any]) -> dict[str, Any]:
        asked = self._body.top is not None
        return {
            "index": choice,
            **said,
            "logprobs": self.logprobs(choice, piece) if asked else None,
            "finish_reason": piece.finish or None,
        }

    def _place(self, choice: int, id: int) -> Place:
        """How the next token of a text is spelled; `id` is that token."""
        place = self._places[choice]
        self._places[choice] = False, id in self._tokenizer.spaced
        return place

    def _piece(self, id: int, place: Place) -> bytes:
        return self._tokenizer.spell([id], *place)[0]

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
        }


class Completion(Answer):
    """The answer of /v1/completions."""

    prefix = "cmpl"
    kind = event_kind = "text_completion"

    def __init__(self, call: Call, served: Served) -> None:
        super().__init__(call, served)
        self._echoes = call.echoes
        self._decoders = [TextDecoder(served.tokenizer, before) for before in self._before]
        self._offsets = [0] * len(call.requests)

    def opening(self) -> list[dict[str, Any]]:
        """With `echo` the prompts, unless their log-probabilities come with them later."""
        if not self._echoes or self._body.top is not None:
            return []
        return [
            self._choice(choice, Piece(""), {"text": echo.text})
            for choice, echo in enumerate(self._echoes)
        ]

    def said(self, choice: int, piece: Piece) -> dict[str, Any]:
        """See `Answer`; with `echo` the prompt comes first."""
        before = self._echoes[choice].text if self._echoes else ""
        return {"text": before + piece.text}

    def added(self, choice: int, piece: Piece) -> dict[str, Any]:
        """See `Answer`; the prompt comes with its log-probabilities, or else in `opening`."""
        return self.said(choice, piece) if piece.prompt else {"text": piece.text}

    def logprobs(self, choice: int, piece: Piece) -> dict[str, Any]:
        """See `Answer`; in OpenAI's layout.

        `text_offset` counts the characters before a token in the choice's text. With `echo` the
        prompt's tokens are the first, of which the first of all has null. The token that ended the
        text is the last, though it is no part of the text.
        """
        tokens: list[Token | None] = [*piece.tokens, *([piece.end] if piece.end else [])]
        ids = [token.id for token in tokens if token]
        if piece.prompt and self._echoes:
            hidden = self._echoes[choice].hidden
            ids = [*self._requests[choice].prompt[hidden:], *ids]
            # The first that is shown has null also where a hidden one precedes it, as OpenAI's.
            echoed = [None, *piece.prompt.tokens][hidden:]
            tokens = [*([None] if echoed else []), *echoed[1:], *tokens]
        offsets, names, likeliest = [], [], []
        for id, token in zip(ids, tokens, strict=True):
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(self._decoders[choice].decode([id]))
            place = self._place(choice, id)
            names.append(_name(self._piece(id, place)))
            likeliest.append(token and self._likeliest(token, place))
        return {
            "tokens": names,
            "token_logprobs": [token and _number(token.logprob) for token in tokens],
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }

    def _likeliest(self, token: Token, place: Place) -> dict[str, float]:
        """The likeliest tokens' texts with their log-probabilities, and the token itself."""
        found: dict[str, float] = {}
        for id, logprob in (*token.top, (token.id, token.logprob)):
            found.setdefault(_name(self._piece(id, place)), _number(logprob))
        return found


class Chat(Answer):
    """The answer of /v1/chat/completions."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    event_kind = "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        """Who speaks."""
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._choice(choice, Piece(""), delta) for choice in range(len(self._requests))]

    def said(self, choice: int, piece: Piece) -> dict[str, Any]:
        """See `Answer`."""
        return {"message": {"role": "assistant", "content": piece.text, "refusal": None}}

    def added(self, choice: int, piece: Piece) -> dict[str, Any]:
        """See `Answer`."""
        return {"delta": {"content": piece.text} if piece.text else {}}

    def logprobs(self, choice: int, piece: Piece) -> dict[str, Any]:
        """See `Answer`."""
        content = []
        for token in piece.tokens:
            place = self._place(choice, token.id)
            top = [self._token(id, logprob, place) for id, logprob in token.top]
            content.append({**self._token(token.id, token.logprob, place), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float, place: Place) -> dict[str, Any]:
        piece = self._piece(id, place)
        text = piece.decode(errors="replace")
        return {"token": text, "logprob": _number(logprob), "bytes": list(piece)}


def _name(piece: bytes) -> str:
    """A token's text; as OpenAI writes it where its bytes are not characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _number(logprob: float) -> float:
    """For JSON, which has no infinity: -9999 for what cannot be, as OpenAI has it."""
    return max(logprob, -9999.0)


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _event(values: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % _json(values)
