"""The server's endpoints, as an ASGI application.

A call's body is parsed into requests, the engine generates their texts, and an `Answer` turns the
texts into a response. No work blocks the event loop: bodies are parsed and tokenized in threads
(large ones one at a time, in a thread of their own), and constraints are compiled in another
thread.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from jaxgpt.chat import choose
from jaxgpt.errors import InputError
from jaxgpt.serve import docs, page
from jaxgpt.serve.answers import FAILURES, Answer, Chat, Completion, Streams
from jaxgpt.serve.api import Call, EmbeddingCall, ServedModel
from jaxgpt.serve.bodies import ApiError, JSONObject
from jaxgpt.serve.constraints import Compiler
from jaxgpt.serve.embeddings import embed
from jaxgpt.serve.engine import Busy, Engine, Stopped
from jaxgpt.serve.guard import (
    SECONDS,
    Guard,
    cancel_on_disconnect,
    error_response,
    read_body,
)
from jaxgpt.serve.metrics import MEDIA_TYPE, Metrics

T = TypeVar("T")

SMALL = 1 << 14
"""The size in bytes of the largest body that is parsed concurrently; larger ones one at a time."""
EMBEDDING = 4
"""The most calls of /v1/embeddings that use the engine at the same time; the others wait."""
LARGE = 16
"""The most large bodies that wait while another is parsed."""


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
    """Builds the ASGI application that serves an engine's model.

    Args:
        engine: A started engine.
        name: The model's name in the API.
        api_key: The key that all calls need except the pages and /health; "": none.
        local: Whether to reject calls whose Host header is not this machine's.
        deadline: The most seconds that an answer may take.
        max_n: The most texts that a call may ask for per prompt.
        add_special_tokens: Whether text prompts begin with the beginning-of-document token.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.draining = False
    served = _served(engine, name, max_n, add_special_tokens)
    metrics = Metrics(lambda: engine.stats)
    compiler = Compiler(engine.trained.tokenizer)
    large = OneByOne("large bodies", LARGE)
    embedding = asyncio.Semaphore(EMBEDDING)
    created = int(time.time())
    page_files = page.read_files()
    docs_page, docs_policy = docs.page()

    async def parsed(parse: Callable[[bytes], T], content: bytes, until: float) -> T:
        """Parses a body in a thread; raises TimeoutError if that takes until the deadline."""
        async with asyncio.timeout(until - time.monotonic()):
            if len(content) > SMALL:
                return await large.run(parse, content)
            return await asyncio.to_thread(parse, content)

    async def prepared(parse: Callable[[bytes], Call], content: bytes, until: float) -> Call:
        """Parses a body and compiles its constraint, which is then part of all its requests."""
        call = await parsed(parse, content, until)
        if (constraint := call.constraint) is None:
            return call
        try:
            guide = await compiler.compile(constraint, until)
        except InputError as error:
            field = constraint.field
            raise ApiError(400, f"{field}: {error}", param=field) from None
        return call._replace(requests=[replace(request, guide=guide) for request in call.requests])

    async def started(request: Request) -> tuple[bytes, float]:
        """Reads a call's body; returns it with the time at which its answer must be complete."""
        if app.state.draining:
            raise _stopping()
        return await read_body(request), time.monotonic() + deadline

    async def answer(
        request: Request, parse: Callable[[bytes], Call], kind: type[Answer]
    ) -> Response:
        content, until = await started(request)
        with _api_errors():
            call = await cancel_on_disconnect(request.receive, prepared(parse, content, until))
            streams = Streams(engine, call.requests, until - time.monotonic(), metrics)
        made = kind(call, served)
        ignored = {"x-jaxgpt-ignored": names} if (names := ", ".join(call.body.ignored)) else {}
        if call.body.stream:
            return Events(made.events(streams), streams, ignored)
        try:
            content = await cancel_on_disconnect(request.receive, made.response(streams))
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

        with _api_errors():
            answered = await cancel_on_disconnect(request.receive, made())
        return Response(answered, media_type="application/json")

    async def tokens(request: Request, parse: Callable[[bytes], JSONObject]) -> JSONObject:
        content, until = await started(request)
        with _api_errors():
            return await cancel_on_disconnect(request.receive, parsed(parse, content, until))

    @app.post("/tokenize")
    async def tokenize(request: Request) -> JSONObject:
        return await tokens(request, served.tokenize)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> JSONObject:
        return await tokens(request, served.detokenize)

    model = {"id": name, "object": "model", "created": created, "owned_by": "jaxgpt"}

    @app.get("/v1/models")
    async def models() -> JSONObject:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> JSONObject:
        served.check_name(asked)
        return model

    @app.get("/info")
    async def info() -> JSONObject:
        return {"name": name, "chat": served.template is not None, "context": served.context}

    @app.get("/health")
    async def health() -> Response:
        status = "draining" if app.state.draining else "ok" if engine.alive else "stalled"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def counted() -> Response:
        return Response(metrics.text(), media_type=MEDIA_TYPE)

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
        known = {404: "this path does not exist", 405: "this path does not allow this method"}
        message = known.get(error.status_code, str(error.detail))
        headers = dict(error.headers) if error.headers else None
        return error_response(ApiError(error.status_code, message, headers=headers))

    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(Guard, api_key=api_key, local=local, metrics=metrics, paths=paths)
    return app


def _served(engine: Engine, name: str, max_n: int, add_special_tokens: bool) -> ServedModel:
    tokenizer, width = engine.trained.tokenizer, engine.trained.config.model.D
    try:
        template = choose(tokenizer)
    except InputError:
        template = None
    return ServedModel(
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
def _api_errors() -> Iterator[None]:
    """Converts exceptions of the engine and the parsers to ApiError."""
    try:
        yield
    except InputError as error:
        raise ApiError(400, str(error), param=error.field) from None
    except Busy as busy:
        raise ApiError(
            429,
            f"the server is overloaded: {busy}; try again later",
            code="queue_full",
            headers={"retry-after": "2"},
        ) from None
    except TimeoutError:
        status, message, code = FAILURES["deadline"]
        raise ApiError(status, message, code=code) from None
    except Stopped:
        raise _stopping() from None


def _stopping() -> ApiError:
    return ApiError(
        503, "the server is shutting down", code="stopped", headers={"retry-after": "30"}
    )


class Events(StreamingResponse):
    """A response of server-sent events.

    It ends with the events, when the client disconnects, or when the client does not receive an
    event within `SECONDS`. sse-starlette would need the same code around it, patches uvicorn's
    signal handler in the whole process, and by default cuts off the last events at shutdown.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], streams: Streams, headers: dict[str, str]
    ) -> None:
        super().__init__(events, headers=headers)
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events; cancels the streams in any case."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SECONDS):
                await send(message)

        try:
            await cancel_on_disconnect(receive, self.stream_response(send_in_time))
        except (ApiError, TimeoutError):
            pass  # the client is gone, so an error cannot be sent
        finally:
            self._streams.cancel()


class OneByOne:
    """Runs functions in one thread, one after the other, for one event loop."""

    def __init__(self, what: str, waiting: int) -> None:
        self._thread = ThreadPoolExecutor(1, what)
        self._what, self._waiting = what, waiting
        self._jobs = 0

    async def run(self, function: Callable[[bytes], T], content: bytes) -> T:
        """Runs the function and returns its result; raises Busy if too many wait already.

        If the caller is cancelled while it waits, the function does not run.
        """
        if self._jobs > self._waiting:
            raise Busy(f"{self._waiting} {self._what} are waiting")
        self._jobs += 1
        try:
            return await asyncio.wrap_future(self._thread.submit(function, content))
        finally:
            self._jobs -= 1
