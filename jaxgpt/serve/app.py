"""The server: its paths, and its life from a model's files to SIGTERM.

A call is read and parsed into requests, the engine generates their texts, and an answer is made of
those. The event loop only waits: bodies are parsed and tokenized in threads, large ones one at a
time in a thread of their own, and constraints are compiled in another.
"""

import asyncio
import ipaddress
import os
import re
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from jaxgpt.chat import choose
from jaxgpt.errors import InputError
from jaxgpt.paths import expand
from jaxgpt.pretrained import generation
from jaxgpt.sampling import Sampling
from jaxgpt.serve import ServeConfig, page
from jaxgpt.serve import engine as engines
from jaxgpt.serve.answers import FAILURES, Answer, Chat, Completion, Streams
from jaxgpt.serve.api import Asked, Call, Refused, Served
from jaxgpt.serve.connections import Connection, raise_file_limit
from jaxgpt.serve.constraints import Compiler
from jaxgpt.serve.engine import Busy, Engine, Stopped
from jaxgpt.serve.guard import SECONDS, Guard, Receive, Send, read, refusal, unless_gone
from jaxgpt.serve.metrics import Metrics
from jaxgpt.trained import load

T = TypeVar("T")

DRAIN = 25.0
"""Seconds that what is running has, after SIGTERM, to end."""
CLOSE = 5
"""Seconds more that connections have to take what is left."""
SMALL = 1 << 14
"""Bytes of the largest body that is parsed beside others; larger ones are parsed one at a time."""
LARGE = 16
"""Large bodies that wait while one is parsed, at most."""


def create_app(
    engine: Engine,
    *,
    name: str,
    api_key: str = "",
    local: bool = True,
    deadline: float = 300.0,
) -> FastAPI:
    """The server of an engine's model, which is called `name`, as an ASGI application.

    With `api_key` every call needs it, but for the page and /health. `local` refuses calls that
    name another host than this machine. An answer takes at most `deadline` seconds.
    """
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.draining = False
    served = _served(engine, name)
    metrics = Metrics()
    compiler = Compiler(engine.trained.tokenizer)
    large = OneByOne("large bodies", LARGE)
    created = int(time.time())
    page_files = page.read_files()

    async def prepared(
        parse: Callable[[bytes], Call], content: bytes, until: float
    ) -> tuple[Asked, list[engines.Request]]:
        """A call's body and requests, parsed, and with what their texts have to match."""
        async with asyncio.timeout(until - time.monotonic()):
            if len(content) > SMALL:
                body, requests, constraint = await large.run(parse, content)
            else:
                body, requests, constraint = await asyncio.to_thread(parse, content)
        if constraint is None:
            return body, requests
        try:
            guide = await compiler.compile(constraint, until)
        except InputError as error:
            field = constraint.field
            raise Refused(400, f"{field}: {error}", param=field) from None
        return body, [replace(request, guide=guide) for request in requests]

    async def answer(
        request: Request, parse: Callable[[bytes], Call], kind: type[Answer]
    ) -> Response:
        if app.state.draining:
            raise _stopping()
        content = await read(request)
        until = time.monotonic() + deadline
        try:
            body, requests = await unless_gone(request.receive, prepared(parse, content, until))
            streams = Streams(engine, requests, until - time.monotonic(), metrics)
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
        made = kind(body, served, requests)
        if body.stream:
            return Events(made.events(streams), streams)
        try:
            content = await unless_gone(request.receive, made.whole(streams))
            return Response(content, media_type="application/json")
        finally:
            streams.cancel()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, served.completion, Completion)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, served.chat, Chat)

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

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        known = {404: "there is nothing at this path", 405: "this path takes another method"}
        message = known.get(error.status_code, str(error.detail))
        headers = dict(error.headers) if error.headers else None
        return refusal(Refused(error.status_code, message, headers=headers))

    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(Guard, api_key=api_key, local=local, metrics=metrics, paths=paths)
    return app


def _served(engine: Engine, name: str) -> Served:
    tokenizer = engine.trained.tokenizer
    try:
        template = choose(tokenizer)
    except InputError:
        template = None
    return Served(name, tokenizer, engine.context, template, engine.trained.generation_config)


def _stopping() -> Refused:
    return Refused(
        503, "the server is shutting down", code="stopped", headers={"retry-after": "30"}
    )


class Events(Response):
    """Server-sent events, until they end, the client leaves, or takes them no longer."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], streams: Streams) -> None:
        super().__init__()
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


def configured(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,  # it would close other libraries' handlers, and stderr with them
        log_level="warning",
        timeout_graceful_shutdown=CLOSE,
    )


class Server(uvicorn.Server):
    """uvicorn, which on the first signal refuses new calls and lets the running ones end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, engine: Engine) -> None:
        super().__init__(config)
        self._app, self._engine = app, engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; the next ends at once."""
        if self._app.state.draining:
            self.should_exit = self.force_exit = True
        else:
            self._app.state.draining = True
            print("ending what is running; once more to end at once", file=sys.stderr)
            threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        self._engine.drain(DRAIN)
        self.should_exit = True


def run(path: str, cfg: ServeConfig) -> None:
    """See `jaxgpt.serve.run`."""
    host, port = cfg.host, cfg.port
    api_key = cfg.api_key or os.environ.get("JAXGPT_API_KEY", "")
    if not re.fullmatch(r"[!-~]*", api_key):
        raise InputError("api_key has characters that no header can; use letters and digits")
    local = _is_local(host)
    if not (local or api_key):
        raise InputError(
            f"host={host} can be reached from other machines; set api_key, or $JAXGPT_API_KEY, to "
            "a secret, or host to 127.0.0.1"
        )
    if not cfg.deadline > 0:
        raise InputError(f"deadline={cfg.deadline}; set it to seconds above 0")
    raise_file_limit()
    with _bound(host, port) as sock:
        trained = load(path, dtype=cfg.dtype)
        for line in generation.notes(trained.generation_config, Sampling()):
            print(line, file=sys.stderr)
        engine = Engine(
            trained, slots=cfg.slots, queue=cfg.queue, context=cfg.context, cache=cfg.cache
        )
        engine.start()
        asked = path.partition("@")[0]
        its_own = trained.config.name if expand(asked).exists() else asked
        name = cfg.name or its_own
        app = create_app(engine, name=name, api_key=api_key, local=local, deadline=cfg.deadline)
        config = configured(app)
        sock.listen(config.backlog)  # who reads where it is may call at once
        print(
            f"{name}: http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}",
            flush=True,
        )
        try:
            Server(config, app, engine).run([sock])
        finally:
            engine.stop()


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    """A socket of the address, not yet listening; InputError where there can be none."""
    if not 0 <= port < 1 << 16:
        raise InputError(f"port={port}; set it from 1 to 65535, or to 0 for a free one")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise InputError(
            f"cannot serve at host={host} port={port}: {error.strerror}; set another"
        ) from None
    return sock
