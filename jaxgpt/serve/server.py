"""Starts the server, loads its model in the background, and shuts the server down on a signal.

The address is bound first, so that a port in use is an error before the model is loaded. Until the
model is loaded and compiled, /health answers "loading" with status 503.
"""

import ipaddress
import os
import re
import socket
import sys
import threading
import time
from types import FrameType

import jax
import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxgpt.errors import InputError
from jaxgpt.generation.sampling import Sampling
from jaxgpt.pretrained import generation
from jaxgpt.pretrained.load import source
from jaxgpt.serve import ServeConfig, memory
from jaxgpt.serve.app import create_app
from jaxgpt.serve.bodies import ApiError
from jaxgpt.serve.connections import Connection, raise_file_limit
from jaxgpt.serve.engine import Engine
from jaxgpt.serve.guard import Guard, error_response
from jaxgpt.serve.metrics import Metrics
from jaxgpt.signals import end_process

DRAIN = 25.0
"""Seconds that running requests have to finish after SIGTERM."""
CLOSE = 5
"""Additional seconds that clients have to receive the rest of their responses."""
BACKLOG = 2048
"""The most connections that wait to be accepted."""
RETRY = {"retry-after": "5"}
"""Headers of the responses while the model is loading."""


class Gate:
    """An ASGI application that answers "loading" until `open` gives it the real application."""

    def __init__(self, api_key: str, local: bool) -> None:
        self._app: ASGIApp = Guard(
            _loading, api_key=api_key, local=local, metrics=Metrics(), paths=set()
        )
        self._state = State()
        self.engine: Engine | None = None
        """The engine; None until the model is loaded."""
        self.draining = False
        """Whether new calls are rejected because the server is shutting down."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one call."""
        await self._app(scope, receive, send)

    def open(self, app: FastAPI, engine: Engine) -> None:
        """Passes all further calls to a FastAPI application."""
        self._app, self._state, self.engine = app, app.state, engine

    def drain(self) -> None:
        """Makes the application reject new calls."""
        self.draining = self._state.draining = True


async def _loading(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application that answers while the model is loading."""
    response: Response
    if scope["path"] == "/health":
        response = JSONResponse({"status": "loading"}, 503, RETRY)
    elif scope["path"] == "/":
        page = (
            '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="2">'
            "<title>Loading</title><p>The model is loading. This page reloads until it is ready."
        )
        response = HTMLResponse(page, 503, RETRY)
    else:
        response = error_response(
            ApiError(503, "the model is loading; try again later", code="loading", headers=RETRY)
        )
    await response(scope, receive, send)


def uvicorn_config(app: ASGIApp) -> uvicorn.Config:
    """Returns uvicorn's configuration for an ASGI application."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,  # uvicorn's would close other libraries' log handlers, and stderr too
        log_level="warning",
        timeout_graceful_shutdown=CLOSE,
    )


class Server(uvicorn.Server):
    """uvicorn's server with a graceful shutdown: a signal rejects new calls and drains others."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(uvicorn_config(gate))
        self._gate = gate

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains on the first signal; exits at once on the second, or while the model loads."""
        if self._gate.engine is None:
            end_process(sig)
        elif self._gate.draining:
            self.should_exit = self.force_exit = True
        else:
            self._gate.drain()
            print(
                "shutting down when running requests are finished; press Ctrl-C again to stop now",
                file=sys.stderr,
            )
            threading.Thread(target=self._drain, args=[self._gate.engine], daemon=True).start()

    def _drain(self, engine: Engine) -> None:
        engine.drain(DRAIN)
        self.should_exit = True


def run(path: str, cfg: ServeConfig) -> None:
    """See `jaxgpt.serve.run`."""
    host, port = cfg.host, cfg.port
    api_key = cfg.api_key or os.environ.get("JAXGPT_API_KEY", "")
    if not re.fullmatch(r"[!-~]*", api_key):
        raise InputError(
            "api_key has characters that are invalid in an HTTP header; use letters and digits"
        )
    local = _is_local(host)
    if not (local or api_key):
        raise InputError(
            f"host={host} can be reached from other machines; set api_key (or $JAXGPT_API_KEY) to "
            "a secret, or use host=127.0.0.1"
        )
    raise_file_limit()
    with _bind(host, port) as sock:
        gate = Gate(api_key, local)
        server = Server(gate)
        address = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
        print(f"loading {path}; {address}/health shows when it is ready", flush=True)
        errors: list[BaseException] = []

        def load() -> None:
            try:
                _load(path, cfg, gate, api_key, local, address)
            except BaseException as error:
                errors.append(error)
                server.should_exit = True

        # Python runs signal handlers in the main thread, so it only runs the event loop.
        threading.Thread(target=load, name="loading", daemon=True).start()
        try:
            server.run([sock])
        finally:
            if gate.engine is not None:
                gate.engine.stop()
        if errors:
            raise errors[0]


def _load(path: str, cfg: ServeConfig, gate: Gate, api_key: str, local: bool, address: str) -> None:
    """Loads the model, starts its engine, and opens the gate."""
    began = time.monotonic()
    found = source(path)
    free = memory.free_memory(jax.devices()[0])
    plan = memory.choose_plan(found, cfg.dtype, cfg.cache, cfg.slots, cfg.context, free)
    print(plan, flush=True)
    for line in generation.notes(found.generation_config, Sampling()):
        print(line, file=sys.stderr)
    try:
        engine = Engine(
            found.load(cfg.dtype),
            slots=plan.slots,
            queue=cfg.queue,
            context=plan.context,
            cache=cfg.cache,
            prefix_cache=cfg.prefix_cache,
        )
        engine.start()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"the device has too little memory: {plan}; use a smaller --slots or --context, "
            "--cache int8 or --dtype int8"
        ) from None
    is_from_hub = "revision" in found.lineage
    name = cfg.name or (path.partition("@")[0] if is_from_hub else found.config.name)
    app = create_app(
        engine,
        name=name,
        api_key=api_key,
        local=local,
        deadline=cfg.deadline,
        max_n=cfg.max_n,
        add_special_tokens=cfg.add_special_tokens,
    )
    gate.open(app, engine)
    print(
        f"{name} is ready after {time.monotonic() - began:.0f} s\n"
        f"  chat page:  {address}/\n"
        f"  API:        {address}/v1, documented at {address}/docs\n"
        "  to stop:    press Ctrl-C",
        flush=True,
    )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at the address, or raises InputError if it cannot be bound."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise InputError(
            f"cannot bind host={host} port={port}: {error.strerror}; use another host or port"
        ) from None
    return sock
