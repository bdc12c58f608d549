"""Limits on HTTP connections, against clients that open many or keep them open (slowloris).

A client has a limited time to send a request's headers, to send its body (see `guard.read_body`)
and to receive an answer. The number of connections is limited, in total and per address. A new
connection over a limit replaces the one that has been without a complete request for longest. If
all have one, the new connection is answered at /health only, and with status 503 elsewhere.
"""

import asyncio
import time

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxgpt.errors import InputError

HEAD_SECONDS = 10.0
"""Time limit for the request line and headers, from connecting or from the last answer."""
SECONDS = 30.0
"""Time limit for a body to arrive, and for a client to receive what the server sends."""
CONNECTIONS = 512
"""The most open connections."""
PER_ADDRESS = 256
"""The most open connections from one address; clients behind a proxy share its address."""
PARTS, PART = 256, 512
"""A chunked body of more than PARTS chunks must have PART bytes per chunk on average, because
parsing a chunk takes time however small it is."""
FULL = "jaxgpt.full"
"""The key in an ASGI scope's state that is true on a connection over the limits."""


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection with the limits of this module."""

    _timer: asyncio.TimerHandle | None = None

    @property
    def has_request(self) -> bool:
        """Whether a request's headers have arrived and its response is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_replaceable(self) -> bool:
        """Whether a new connection may replace this one: it has no complete request."""
        return not self.has_request or self.cycle.more_body

    # Callbacks of asyncio

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Replaces another connection if there are too many, or marks this one as over a limit."""
        super().connection_made(transport)
        self.conn = _Parser(h11.SERVER)
        self.waiting_since = time.monotonic()
        if not self._make_room():
            self.app_state = {**self.app_state, FULL: True}
        self._restart_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Starts the timer: the client does not receive what is sent to it."""
        super().pause_writing()
        self._restart_timer()

    def resume_writing(self) -> None:
        """Restarts the timer: the client has received most of what was sent."""
        super().resume_writing()
        self._restart_timer()

    # Methods of uvicorn

    def handle_events(self) -> None:
        """Stops the timer when a request's headers are complete."""
        super().handle_events()
        if self.has_request and not self.flow.write_paused:
            self._stop_timer()

    def on_response_complete(self) -> None:
        """Starts the timer for the next request's headers."""
        self.waiting_since = time.monotonic()
        super().on_response_complete()
        self._restart_timer()

    def send_400_response(self, msg: str) -> None:
        """Answers invalid HTTP with status 400, or disconnects if a response is being sent."""
        if self.has_request:  # the rest of the request's body cannot be parsed
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    # Limits

    def _make_room(self) -> bool:
        """Replaces other connections if there are too many; returns False if none can be."""
        for most, address in ((PER_ADDRESS, self._address), (CONNECTIONS, None)):
            others = [
                other
                for other in self.connections
                if isinstance(other, Connection) and other is not self
                if address in (None, other._address)
            ]
            if len(others) >= most:
                replaceable = [other for other in others if other.is_replaceable]
                if not replaceable:
                    return False
                min(replaceable, key=lambda other: other.waiting_since)._drop()
        return True

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def _drop(self) -> None:
        self.connections.discard(self)
        self.transport.abort()

    def _restart_timer(self) -> None:
        self._stop_timer()
        if self.flow.write_paused:
            self._timer = self.loop.call_later(SECONDS, self.transport.abort)
        elif not self.has_request:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        """Closes the connection after the pending output, or when `SECONDS` have passed."""
        self.transport.close()
        self._timer = self.loop.call_later(SECONDS, self.transport.abort)


class _Parser(h11.Connection):
    """h11's parser, which raises an error for a body in too many small chunks."""

    _parts = _bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA | h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._parts = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._parts += 1
            self._bytes += len(event.data)
            if self._parts > PARTS and self._bytes < PART * self._parts:
                raise h11.RemoteProtocolError(f"the body's {self._parts} chunks are too small")
        return event


def raise_file_limit() -> None:
    """Raises the limit on open files to twice the number of connections.

    Raises:
        InputError: The system's hard limit is lower.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    needed = 2 * CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    too_few = [limit != resource.RLIM_INFINITY and limit < needed for limit in (soft, hard)]
    if too_few[1]:
        raise InputError(
            f"the system allows {hard} open files, which is too few for {CONNECTIONS} "
            f"connections; raise the hard limit (ulimit -Hn) to {needed} or more"
        )
    if too_few[0]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
