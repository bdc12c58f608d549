"""Middleware in front of every endpoint: authentication, body size and security headers."""

import asyncio
import hmac
import logging
import re
from collections.abc import Coroutine
from typing import TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxgpt.serve import page
from jaxgpt.serve.bodies import ApiError
from jaxgpt.serve.connections import FULL, SECONDS
from jaxgpt.serve.metrics import Metrics

T = TypeVar("T")

MAX_BODY_BYTES = 1 << 20
"""The largest size of a body."""
PUBLIC_PATHS = ("/health", "/docs", *page.FILES)
"""Paths that need no API key, because they give no access to the model."""
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
    """ASGI middleware that authenticates calls, adds `HEADERS` and counts responses.

    It also converts every exception to an error in OpenAI's format that reveals no internals. With
    `local` it accepts only this machine's names in the Host header, so that another site whose
    name resolves to 127.0.0.1 (DNS rebinding) has no access.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str, local: bool, metrics: Metrics, paths: set[str]
    ) -> None:
        self.app = app
        self.api_key = api_key.encode()
        self.local = local
        self.metrics = metrics
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one call."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.responses.labels(path, message["status"]).inc()
                given = {name.lower() for name, _ in message["headers"]}
                for name, value in HEADERS.items():
                    if name.encode() not in given:
                        message["headers"].append((name.encode(), value.encode()))
            await send(message)

        try:
            if scope.get("state", {}).get(FULL) and scope["path"] != "/health":
                raise ApiError(
                    503,
                    "too many connections are open; close some of them, or try again later",
                    code="too_many_connections",
                    headers={"retry-after": "2", "connection": "close"},
                )
            self._check(Request(scope))
            await self.app(scope, receive, guarded)
        except ApiError as error:
            await error_response(error)(scope, receive, guarded)
        except Exception:
            logging.getLogger("uvicorn.error").exception("%s failed", scope["path"])
            if started:  # too late for an error response: uvicorn closes the connection
                raise
            failure = ApiError(500, "internal error; see the server's log", code="failed")
            await error_response(failure)(scope, receive, guarded)

    def _check(self, request: Request) -> None:
        """Raises ApiError if the Host, the origin or the API key of a call is not allowed."""
        host = request.headers.get("host", "").lower()
        if self.local and not re.fullmatch(
            r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", host
        ):
            raise ApiError(
                403,
                f"host {host[:100]!r} is not this machine's name; use 127.0.0.1, or start the "
                "server with --host and an API key",
                code="host_not_allowed",
            )
        # Browsers set this header; it tells whether another site's page has made the request.
        if request.method != "GET" and request.headers.get("sec-fetch-site", "none") not in (
            "same-origin",
            "none",
        ):
            raise ApiError(403, "requests from other sites' pages are rejected", code="cross_site")
        if self.api_key and request.scope["path"] not in PUBLIC_PATHS:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            known = hmac.compare_digest(key.strip().encode(), self.api_key)
            if not known or scheme.lower() != "bearer":
                raise ApiError(
                    401,
                    "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )


def error_response(error: ApiError) -> JSONResponse:
    """Converts an error to a response."""
    return JSONResponse(error.body, error.status, error.headers)


async def read_body(request: Request) -> bytes:
    """Reads a request's JSON body.

    Raises:
        ApiError: The content type is not JSON, the body is too large or arrives too slowly, or the
            client has disconnected.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or "content-encoding" in request.headers:
        raise ApiError(
            415,
            "the body must be JSON: use content-type application/json and no content-encoding",
            code="unsupported_media_type",
        )
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(
                        413,
                        f"the body is too large; send at most {MAX_BODY_BYTES} bytes",
                        code="body_too_large",
                    )
    except ClientDisconnect:
        raise ApiError(499, "the client has disconnected", code="client_left") from None
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {SECONDS:g} seconds", code="too_slow"
        ) from None
    return bytes(body)


async def cancel_on_disconnect(receive: Receive, work: Coroutine[object, None, T]) -> T:
    """Awaits `work` and returns its result, but cancels it if the client disconnects.

    Args:
        receive: The ASGI callable that reports a disconnect.
        work: The coroutine to run.

    Raises:
        ApiError: The client has disconnected.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = working, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "the client has disconnected", code="client_left")
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.wait(tasks)
