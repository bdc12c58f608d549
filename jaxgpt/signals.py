"""Handles the signals that end a run: SIGTERM, Ctrl-C (SIGINT) and a closed terminal (SIGHUP).

Python runs signal handlers in the main thread, between two bytecode instructions. This may be
inside a callback of JAX, where an exception is swallowed or fatal, or minutes later, after a
compilation. So the handler here does nothing. Instead, a thread receives the signal immediately,
through a pipe, and either sets a flag that the training loop checks or ends the process.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from jaxgpt.streams import in_kernel

Result = TypeVar("Result")

HANDLED = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]

before_end: list[Callable[[str], object]] = []
"""Called with the name of the signal, for some seconds at most, before it ends the process."""

_abandoned = threading.Event()  # set if a thread still runs the work that a signal interrupted


class Interrupted(Exception):
    """A signal arrived during work that can be repeated."""


class Signals:
    """A context manager that handles the signals of this process.

    A signal ends the process immediately with status 128 + its number. Inside the context
    `deferred`, the first signal is only recorded in `received`, and a second one ends the process.
    In threads other than the main thread, in which Python does not handle signals, it does nothing.

    Args:
        ends_process: Whether signals end the process. With False, and always in the kernel of a
            notebook, only Ctrl-C is handled, and it is only recorded.
    """

    def __init__(self, ends_process: bool = True) -> None:
        self._ends_process = ends_process and not in_kernel()
        self.received = 0
        """The number of the signal that was received; 0: none."""
        self._deferred = False
        self._limit = 0.0
        self._lock = threading.Lock()  # protects `_deferred` and `received`
        self._event = threading.Event()
        self._events = [self._event]

    def __enter__(self) -> "Signals":
        # Signals that are ignored, such as SIGHUP under nohup, stay ignored.
        handled = HANDLED if self._ends_process else [signal.SIGINT]
        if threading.current_thread() is not threading.main_thread():
            handled = []
        numbers = [n for n in handled if signal.getsignal(n) is not signal.SIG_IGN]
        self._handlers = {n: signal.signal(n, lambda *_: None) for n in numbers}
        if not numbers:
            return self
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._handlers:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writer)  # ends the thread

    @contextmanager
    def deferred(self, limit: float = 0.0) -> Iterator[None]:
        """Defers the end of the process, so that the block can check `received` and react.

        Args:
            limit: Seconds after a signal in which the block must end; else the process ends, as if
                the block hangs. 0: no limit.
        """
        self._deferred, self._limit = True, limit
        try:
            yield
        finally:
            with self._lock:
                self._deferred = False

    def wait(self, seconds: float) -> None:
        """Sleeps for some seconds, or until a signal is received."""
        self._event.wait(seconds)

    def notify(self, event: threading.Event) -> None:
        """Also sets an event when a signal is received."""
        self._events.append(event)

    def run(self, work: Callable[[], Result]) -> Result:
        """Runs a function in a thread, and returns or raises what it does.

        Raises:
            Interrupted: A signal was received. The thread is abandoned and ends with the process.
        """
        results: list[Result] = []
        errors: list[BaseException] = []

        def target() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=target, name="interruptible", daemon=True)
        thread.start()
        while thread.is_alive() and not self.received:
            thread.join(0.05)
        if errors:
            raise errors[0]
        if not results:
            _abandoned.set()
            raise Interrupted
        return results[0]

    def _end_if_deferred(self, number: int) -> None:
        with self._lock:
            if self._deferred:
                end_process(number)

    def _watch(self) -> None:
        with open(self._reader, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                if byte[0] not in self._handlers:
                    continue
                with self._lock:
                    if self._ends_process and (self.received or not self._deferred):
                        end_process(byte[0])
                    self.received = byte[0]
                    if self._limit:
                        late = threading.Timer(self._limit, self._end_if_deferred, (byte[0],))
                        late.daemon = True
                        late.start()
                for event in self._events:
                    event.set()


@contextmanager
def python_handlers() -> Iterator[None]:
    """Restores Python's own signal handlers inside a `Signals` context, for code without JAX.

    Ctrl-C raises KeyboardInterrupt, and other signals end the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wakeup = signal.set_wakeup_fd(-1)
    handlers = {n: signal.getsignal(n) for n in HANDLED}
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            is_ctrl_c = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


def end_if_abandoned(status: int) -> None:
    """Ends the process if `Signals.run` has abandoned a thread, which could block a normal exit."""
    if _abandoned.is_set() and not in_kernel():
        _flush_and_print("")
        os._exit(status)


def end_process(number: int) -> None:
    """Ends this process immediately with a signal's exit status, even if other threads are busy."""
    name = signal.Signals(number).name
    _flush_and_print(f"ended by {name}\n")
    for call in before_end:
        thread = threading.Thread(target=call, args=(name,), daemon=True)
        thread.start()
        thread.join(10.0)
    os._exit(128 + number)


def _flush_and_print(text: str) -> None:
    """Flushes stdout and prints to stderr; gives up after a second if the output is not read."""

    def write() -> None:
        with suppress(OSError, ValueError):  # the output is closed
            if text and sys.stdout.isatty():
                sys.stdout.write("\x1b[?25h")  # show the cursor, which a live display hides
            sys.stdout.flush()
            sys.stderr.write(text)
            sys.stderr.flush()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(1.0)
