"""Pieces of text from the engine's thread to OpenAI's answers, whole or as events."""

import asyncio
import codecs
import contextlib
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from jaxgpt.serve.api import Asked, Refused, Served
from jaxgpt.serve.engine import Engine, Piece, Request, Stream, Token
from jaxgpt.serve.metrics import Metrics

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

    def __init__(self, body: Asked, served: Served, requests: Sequence[Request]) -> None:
        self._body = body
        self._tokenizer = served.tokenizer
        # How the next token of each choice is spelled, see `Tokenizer.spell`.
        self._places = [
            served.tokenizer.place(request.prompt if request.continues else ())
            for request in requests
        ]
        self._choices = len(requests)
        self._prompt_tokens = sum(len(request.prompt) for request in requests[:: body.choices])
        self._tokens = 0
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
        }

    async def whole(self, streams: Streams) -> bytes:
        """The whole answer as JSON, once it is finished."""
        pieces: list[list[Piece]] = [[] for _ in range(self._choices)]
        async for written in streams:
            if written:
                pieces[written.choice].append(written.piece)
        return await asyncio.to_thread(self._whole, pieces)  # megabytes, with log probabilities

    def _whole(self, pieces: list[list[Piece]]) -> bytes:
        choices = []
        for choice, some in enumerate(pieces):
            tokens = tuple(token for piece in some for token in piece.tokens)
            self._tokens += len(tokens)
            piece = Piece("".join(piece.text for piece in some), tokens, some[-1].finish)
            choices.append(self._choice(choice, piece, self.said(piece.text)))
        return _json(
            {**self._head, "object": self.kind, "choices": choices, "usage": self._usage()}
        )

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
                if piece.text or piece.finish or (piece.tokens and self._body.top is not None):
                    said = self._choice(choice, piece, self.added(piece.text))
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
    def said(self, text: str) -> dict[str, Any]:
        """A whole choice's own field."""

    @abstractmethod
    def added(self, text: str) -> dict[str, Any]:
        """The same of an event's choice."""

    @abstractmethod
    def logprobs(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """Log probabilities of tokens, the next ones of a choice."""

    def _choice(self, choice: int, piece: Piece, said: dict[str, Any]) -> dict[str, Any]:
        asked = self._body.top is not None
        return {
            "index": choice,
            **said,
            "logprobs": self.logprobs(choice, piece.tokens) if asked else None,
            "finish_reason": piece.finish or None,
        }

    def _placed(self, choice: int, tokens: Sequence[Token]) -> Iterator[tuple[Token, Place]]:
        """The next tokens of a choice, each with the place by which it is spelled."""
        for token in tokens:
            yield token, self._places[choice]
            self._places[choice] = False, token.id in self._tokenizer.spaced

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

    def __init__(self, body: Asked, served: Served, requests: Sequence[Request]) -> None:
        super().__init__(body, served, requests)
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = [decoder("replace") for _ in requests]
        self._offsets = [0] * len(requests)

    def said(self, text: str) -> dict[str, Any]:
        """See `Answer`."""
        return {"text": text}

    added = said

    def logprobs(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """See `Answer`; `text_offset` counts the characters before a token in the choice's text."""
        offsets, names, top = [], [], []
        for token, place in self._placed(choice, tokens):
            offsets.append(self._offsets[choice])
            piece = self._piece(token.id, place)
            self._offsets[choice] += len(self._decoders[choice].decode(piece))
            names.append(_name(piece))
            top.append({_name(self._piece(id, place)): _number(p) for id, p in token.top})
        return {
            "tokens": names,
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }


class Chat(Answer):
    """The answer of /v1/chat/completions."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    event_kind = "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        """Who speaks."""
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._choice(choice, Piece("", (), ""), delta) for choice in range(self._choices)]

    def said(self, text: str) -> dict[str, Any]:
        """See `Answer`."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def added(self, text: str) -> dict[str, Any]:
        """See `Answer`."""
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """See `Answer`."""
        content = [
            {
                **self._token(token.id, token.logprob, place),
                "top_logprobs": [self._token(id, logprob, place) for id, logprob in token.top],
            }
            for token, place in self._placed(choice, tokens)
        ]
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
