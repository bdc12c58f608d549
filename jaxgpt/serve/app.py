"""The server's paths, as an ASGI application.

A call is read and parsed into requests, the engine generates their texts, and an answer is made of
those. The event loop only waits: bodies are parsed and tokenized in threads, large ones one at a
time in a thread of their own, and constraints are compiled in another.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from jaxgpt.chat import choose
from jaxgpt.errors import InputError
from jaxgpt.serve import docs, page
from jaxgpt.serve.answers import FAILURES, Answer, Chat, Completion, Streams
from jaxgpt.serve.api import Call, EmbeddingCall, Served
from jaxgpt.serve.bodies import Refused
from jaxgpt.serve.constraints import Compiler
from jaxgpt.serve.embeddings import embed
from jaxgpt.serve.engine import Busy, Engine, Stopped
from jaxgpt.serve.guard import SECONDS, Guard, Receive, Send, read, refusal, unless_gone
from jaxgpt.serve.metrics import Metrics

T = TypeVar("T")

SMALL = 1 << 14
"""Bytes of the largest body that is parsed beside others; larger ones are parsed one at a time."""
EMBEDDING = 4
"""Calls of /v1/embeddings that take a place in the engine's queue at once; the others wait."""
LARGE = 16
"""Large bodies that wait while one is parsed, at most."""


def create_app(
    engine: Engine,
    *,
    name: str,
    api_key: str = "",
    local: bool = True,
    deadline: float = 300.0,
    max_n: int = 16,
    add_special_tokens: bool = True,
) -> FastAPI:
    """The server of an engine's model as an ASGI application.

    Args:
        engine: It has been started.
        name: What the model is called.
        api_key: What every call needs, but for the pages and /health; "": nothing.
        local: Whether calls that name another host than this machine are refused.
        deadline: Seconds that an answer takes, at most.
        max_n: Texts that a call may ask for a prompt, at most.
        add_special_tokens: Whether prompts of text begin as documents do.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.draining = False
    served = _served(engine, name, max_n, add_special_tokens)
    metrics = Metrics()
    compiler = Compiler(engine.trained.tokenizer)
    large = OneByOne("large bodies", LARGE)
    embedding = asyncio.Semaphore(EMBEDDING)
    created = int(time.time())
    page_files = page.read_files()
    docs_page, docs_policy = docs.page()

    async def parsed(parse: Callable[[bytes], T], content: bytes, until: float) -> T:
        """What `parse` returns, computed in a thread before the deadline."""
        async with asyncio.timeout(until - time.monotonic()):
            if len(content) > SMALL:
                return await large.run(parse, content)
            return await asyncio.to_thread(parse, content)

    async def prepared(parse: Callable[[bytes], Call], content: bytes, until: float) -> Call:
        """A call that was parsed, whose requests have what their texts have to match."""
        call = await parsed(parse, content, until)
        if (constraint := call.constraint) is None:
            return call
        try:
            guide = await compiler.compile(constraint, until)
        except InputError as error:
            field = constraint.field
            raise Refused(400, f"{field}: {error}", param=field) from None
        return call._replace(requests=[replace(request, guide=guide) for request in call.requests])

    async def started(request: Request) -> tuple[bytes, float]:
        """A call's body, and when its answer has to be complete."""
        if app.state.draining:
            raise _stopping()
        return await read(request), time.monotonic() + deadline

    async def answer(
        request: Request, parse: Callable[[bytes], Call], kind: type[Answer]
    ) -> Response:
        content, until = await started(request)
        with _refusing():
            call = await unless_gone(request.receive, prepared(parse, content, until))
            streams = Streams(engine, call.requests, until - time.monotonic(), metrics)
        made = kind(call, served)
        ignored = {"x-jaxgpt-ignored": names} if (names := ", ".join(call.body.ignored)) else {}
        if call.body.stream:
            return Events(made.events(streams), streams, ignored)
        try:
            content = await unless_gone(request.receive, made.whole(streams))
            return Response(content, media_type="application/json", headers=ignored)
        finally:
            streams.cancel()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, served.completion, Completion)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, served.chat, Chat)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        content, until = await started(request)

        async def made() -> bytes:
            call: EmbeddingCall = await parsed(served.embedding, content, until)
            async with asyncio.timeout(until - time.monotonic()), embedding:
                return await embed(call, served, engine, metrics, until)

        with _refusing():
            answered = await unless_gone(request.receive, made())
        return Response(answered, media_type="application/json")

    async def tokens(request: Request, parse: Callable[[bytes], dict[str, Any]]) -> dict[str, Any]:
        content, until = await started(request)
        with _refusing():
            return await unless_gone(request.receive, parsed(parse, content, until))

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        return await tokens(request, served.tokenize)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        return await tokens(request, served.detokenize)

    model = {"id": name, "object": "model", "created": created, "owned_by": "jaxgpt"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        served.check_name(asked)
        return model

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return {"name": name, "chat": served.template is not None, "context": served.context}

    @app.get("/health")
    async def health() -> Response:
        status = "draining" if app.state.draining else "ok" if engine.alive else "stalled"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def counted() -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return PlainTextResponse(metrics.text(engine.stats), media_type=kind)

    async def page_file(request: Request) -> Response:
        content, media_type = page_files[request.scope["path"]]
        headers = {"content-security-policy": page.POLICY}
        return Response(content, media_type=media_type, headers=headers)

    for path in page_files:
        app.add_api_route(path, page_file, include_in_schema=False)

    @app.get("/docs")
    async def documentation() -> Response:
        return HTMLResponse(docs_page, headers={"content-security-policy": docs_policy})

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        known = {404: "there is nothing at this path", 405: "this path takes another method"}
        message = known.get(error.status_code, str(error.detail))
        headers = dict(error.headers) if error.headers else None
        return refusal(Refused(error.status_code, message, headers=headers))

    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(Guard, api_key=api_key, local=local, metrics=metrics, paths=paths)
    return app


def _served(engine: Engine, name: str, max_n: int, add_special_tokens: bool) -> Served:
    tokenizer, width = engine.trained.tokenizer, engine.trained.config.model.D
    try:
        template = choose(tokenizer)
    except InputError:
        template = None
    return Served(
        name,
        tokenizer,
        engine.context,
        width,
        template,
        texts=engine.capacity,
        max_n=max_n,
        add_special_tokens=add_special_tokens,
        generation_config=engine.trained.generation_config,
    )


@contextmanager
def _refusing() -> Iterator[None]:
    """Turns what keeps a call from being answered into Refused."""
    try:
        yield
    except InputError as error:
        field = re.match(r"(\w+)[:=]", str(error))
        raise Refused(400, str(error), param=field and field[1]) from None
    except Busy as busy:
        raise Refused(
            429,
            f"the server has too much to do: {busy}; ask again soon",
            code="queue_full",
            headers={"retry-after": "2"},
        ) from None
    except TimeoutError:
        status, message, code = FAILURES["deadline"]
        raise Refused(status, message, code=code) from None
    except Stopped:
        raise _stopping() from None


def _stopping() -> Refused:
    return Refused(
        503, "the server is shutting down", code="stopped", headers={"retry-after": "30"}
    )


class Events(Response):
    """Server-sent events, until they end, the client leaves, or takes them no longer."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], streams: Streams, headers: dict[str, str]
    ) -> None:
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._events, self._streams = events, streams

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Writes them; lets go of the streams, however it ends."""
        try:
            await unless_gone(receive, self._write(send))
        except (Refused, TimeoutError):
            pass  # nobody is there to be told
        finally:
            self._streams.cancel()

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for event in self._events:
            async with asyncio.timeout(SECONDS):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class OneByOne:
    """Runs functions in one thread, one after the other, for one event loop."""

    def __init__(self, what: str, waiting: int) -> None:
        self._thread = ThreadPoolExecutor(1, what)
        self._what, self._waiting = what, waiting
        self._jobs = 0

    async def run(self, function: Callable[[bytes], T], content: bytes) -> T:
        """What the function returns; it does not run if this is cancelled while it waits.

        Raises Busy if too many wait.
        """
        if self._jobs > self._waiting:
            raise Busy(f"{self._waiting} {self._what} wait")
        self._jobs += 1
        try:
            return await asyncio.wrap_future(self._thread.submit(function, content))
        finally:
            self._jobs -= 1
