"""The server's life: an address, a model that is loaded while the server listens, and its end.

The address is bound first, so that a port in use is an error before any loading. From then on
/health answers: "loading", with status 503, until the model is loaded and compiled.
"""

import ipaddress
import os
import re
import socket
import sys
import threading
import time
from collections.abc import MutableMapping
from types import FrameType
from typing import Any

import jax
import uvicorn
from fastapi.responses import HTMLResponse, JSONResponse, Response

from jaxgpt.errors import InputError
from jaxgpt.generation.sampling import Sampling
from jaxgpt.pretrained import generation
from jaxgpt.pretrained.load import source
from jaxgpt.serve import ServeConfig, memory
from jaxgpt.serve.app import create_app
from jaxgpt.serve.bodies import Refused
from jaxgpt.serve.connections import Connection, raise_file_limit
from jaxgpt.serve.engine import Engine
from jaxgpt.serve.guard import App, Guard, Receive, Send, refusal
from jaxgpt.serve.metrics import Metrics
from jaxgpt.signals import end_process

DRAIN = 25.0
"""Seconds that what is running has, after SIGTERM, to end."""
CLOSE = 5
"""Seconds more that connections have to take what is left."""
BACKLOG = 2048
"""Connections that wait to be accepted, at most."""
RETRY = {"retry-after": "5"}
"""Headers of what is answered while the model is loading."""


class Gate:
    """An ASGI application that says it is loading, until the one behind it is there."""

    def __init__(self, api_key: str, local: bool) -> None:
        self._app: App = Guard(
            _loading, api_key=api_key, local=local, metrics=Metrics(), paths=set()
        )
        self._state: Any = None
        self.engine: Engine | None = None
        """The engine, once it takes requests."""
        self.draining = False
        """Whether new calls are refused, because the server is shutting down."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One call."""
        await self._app(scope, receive, send)

    def open(self, app: Any, engine: Engine) -> None:
        """Gives calls to a FastAPI application from now on."""
        self._app, self._state, self.engine = app, app.state, engine

    def drain(self) -> None:
        """Refuses new calls."""
        self.draining = self._state.draining = True


async def _loading(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """What is answered while the model is loading."""
    response: Response
    if scope["path"] == "/health":
        response = JSONResponse({"status": "loading"}, 503, RETRY)
    elif scope["path"] == "/":
        page = (
            '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="2">'
            "<title>Loading</title><p>The model is loading. This page waits for it."
        )
        response = HTMLResponse(page, 503, RETRY)
    else:
        response = refusal(
            Refused(503, "the model is loading; ask again soon", code="loading", headers=RETRY)
        )
    await response(scope, receive, send)


def configured(app: Any) -> uvicorn.Config:
    """How uvicorn serves an ASGI application."""
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

    def __init__(self, gate: Gate) -> None:
        super().__init__(configured(gate))
        self._gate = gate

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; the next, or one while the model is loading, ends at once."""
        if self._gate.engine is None:
            end_process(sig)
        elif self._gate.draining:
            self.should_exit = self.force_exit = True
        else:
            self._gate.drain()
            print("ending what is running; once more to end at once", file=sys.stderr)
            threading.Thread(target=self._drain, args=[self._gate.engine], daemon=True).start()

    def _drain(self, engine: Engine) -> None:
        engine.drain(DRAIN)
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
    if cfg.max_n < 1:
        raise InputError(f"max_n={cfg.max_n}; set it to 1 or more")
    raise_file_limit()
    with _bound(host, port) as sock:
        gate = Gate(api_key, local)
        server = Server(gate)
        address = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
        print(f"loading {path}; until then {address}/health says so", flush=True)
        errors: list[BaseException] = []

        def load() -> None:
            try:
                _load(path, cfg, gate, api_key, local, address)
            except BaseException as error:
                errors.append(error)
                server.should_exit = True

        # Signals are handled in the main thread, which therefore only runs the event loop.
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
    plan = memory.choose(found, cfg.dtype, cfg.cache, cfg.slots, cfg.context, free)
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
        )
        engine.start()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"the device's memory does not suffice for {plan}; set a smaller --slots or --context, "
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
        f"  to chat:     {address}/\n"
        f"  the API:     {address}/v1, described at {address}/docs\n"
        "  to stop it:  Ctrl-C",
        flush=True,
    )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens at the address; InputError where there can be none."""
    if not 0 <= port < 1 << 16:
        raise InputError(f"port={port}; set it from 1 to 65535, or to 0 for a free one")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise InputError(
            f"cannot serve at host={host} port={port}: {error.strerror}; set another"
        ) from None
    return sock
