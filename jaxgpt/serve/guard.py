"""What stands before every call: who may ask, how much, and what a browser is told to allow."""

import asyncio
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from jaxgpt.serve import page
from jaxgpt.serve.bodies import Refused
from jaxgpt.serve.connections import FULL, SECONDS
from jaxgpt.serve.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
T = TypeVar("T")

BYTES = 1 << 20
"""Of a body, at most."""
OPEN = ("/health", "/docs", *page.FILES)
"""Paths that need no key: nothing of the model is in them."""
HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Middleware: refuses who may not ask, adds `HEADERS`, counts, and keeps errors to OpenAI's
    format, without what is inside.

    With `local`, only this machine's names are taken for the server's: a page elsewhere whose
    name is made to mean 127.0.0.1 (DNS rebinding) is refused.
    """

    def __init__(
        self, app: App, *, api_key: str, local: bool, metrics: Metrics, paths: set[str]
    ) -> None:
        self.app = app
        self.api_key = api_key.encode()
        self.local = local
        self.metrics = metrics
        self.paths = paths

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One call."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.responses[path, message["status"]] += 1
                given = {name.lower() for name, _ in message["headers"]}
                for name, value in HEADERS.items():
                    if name.encode() not in given:
                        message["headers"].append((name.encode(), value.encode()))
            await send(message)

        try:
            if scope.get("state", {}).get(FULL) and scope["path"] != "/health":
                raise Refused(
                    503,
                    "too many connections are open; close some, or try again later",
                    code="too_many_connections",
                    headers={"retry-after": "2", "connection": "close"},
                )
            self._check(Request(scope))
            await self.app(scope, receive, guarded)
        except Refused as refused:
            await refusal(refused)(scope, receive, guarded)
        except Exception:
            logging.getLogger("uvicorn.error").exception("%s failed", scope["path"])
            if started:  # only a connection that breaks off can still say so
                raise
            error = Refused(500, "the server failed; its log says why", code="failed")
            await refusal(error)(scope, receive, guarded)

    def _check(self, request: Request) -> None:
        """Raises Refused for who may not ask."""
        host = request.headers.get("host", "").lower()
        if self.local and not re.fullmatch(
            r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", host
        ):
            raise Refused(
                403,
                f"host {host[:100]!r} is not this machine's; ask 127.0.0.1, or serve with a key "
                "and another host",
                code="host_not_allowed",
            )
        # What browsers say of a request that another site's page has made.
        if request.method != "GET" and request.headers.get("sec-fetch-site", "none") not in (
            "same-origin",
            "none",
        ):
            raise Refused(403, "pages of other sites may not ask", code="cross_site")
        if self.api_key and request.scope["path"] not in OPEN:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            known = hmac.compare_digest(key.strip().encode(), self.api_key)
            if not known or scheme.lower() != "bearer":
                raise Refused(
                    401,
                    "give the server's API key: Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )


def refusal(refused: Refused) -> JSONResponse:
    """The response that says it."""
    return JSONResponse(refused.body, refused.status, refused.headers)


async def read(request: Request) -> bytes:
    """A JSON body; Refused where it is called something else, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or "content-encoding" in request.headers:
        raise Refused(415, "send application/json, not encoded", code="unsupported_media_type")
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > BYTES:
                    raise Refused(
                        413, f"the body has more than {BYTES} bytes", code="body_too_large"
                    )
    except ClientDisconnect:
        raise Refused(499, "the client has left", code="client_left") from None
    except TimeoutError:
        raise Refused(408, f"the body took over {SECONDS:g} seconds", code="too_slow") from None
    return bytes(body)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns; where the client leaves before, the work is cancelled, and Refused."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = working, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Refused(499, "the client has left", code="client_left")
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.wait(tasks)
