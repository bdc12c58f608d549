"""Signals that ask a run to end: SIGTERM, Ctrl-C (SIGINT) and a closed terminal (SIGHUP).

Python runs signal handlers in the main thread between two of its instructions, which may be inside
a callback of jax, where an exception is swallowed or fatal, or minutes later, while XLA compiles.
So the handler here does nothing; a thread learns of the signal at once, through a pipe, and either
sets a flag that the training loop looks at or ends the process.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

Result = TypeVar("Result")

HANDLED = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]

_abandoned = threading.Event()  # a thread of this process still does what was interrupted


class Interrupted(Exception):
    """A signal came during work that can be done again."""


class Signals:
    """Signals of this process while the context is entered.

    A signal ends the process at once with status 128 + its number, unless the context `deferred`
    is entered: then the first one is only noted, in `received`, and the second ends the process.

    Args:
        ends_process: False never ends the process and notes Ctrl-C alone: for notebooks, whose
            kernel lives on. Python lets only the main thread handle signals: in another thread,
            nothing is handled or noted.
    """

    def __init__(self, ends_process: bool = True) -> None:
        self._ends_process = ends_process
        self.received = 0
        """The number of the signal that came; 0 for none."""
        self._deferred = False
        self._lock = threading.Lock()  # of `_deferred` and `received`
        self._event = threading.Event()

    def __enter__(self) -> "Signals":
        # A signal that is ignored stays ignored, as SIGHUP is under nohup.
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

    def __exit__(self, *_: Any) -> None:
        if not self._handlers:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writer)  # which ends the thread

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets the block, and what looks at `received` after it, react before the process ends."""
        self._deferred = True
        try:
            yield
        finally:
            with self._lock:
                self._deferred = False

    def wait(self, seconds: float) -> None:
        """Sleeps, until a signal comes."""
        self._event.wait(seconds)

    def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises, or Interrupted as soon as a signal comes.

        It runs in a thread, which is abandoned then and ends with the process.
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

    def _watch(self) -> None:
        with open(self._reader, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                if byte[0] not in self._handlers:
                    continue
                with self._lock:
                    if self._ends_process and (self.received or not self._deferred):
                        end_process(byte[0])
                    self.received = byte[0]
                self._event.set()


@contextmanager
def python_handlers() -> Iterator[None]:
    """Python's own handling of signals inside a `Signals` context, for code that runs no jax.

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
    """Ends the process if `Signals.run` has abandoned a thread, which could hang a clean exit."""
    if _abandoned.is_set():
        _say("")
        os._exit(status)


def end_process(number: int) -> None:
    """Ends this process at once as a signal's number says, whatever its other threads do."""
    _say(f"ended by {signal.Signals(number).name}\n")
    os._exit(128 + number)


def _say(text: str) -> None:
    """Writes to stderr what is left to say; waits at most a second for whoever reads it."""

    def write() -> None:
        with suppress(OSError, ValueError):  # nobody reads it
            if text and sys.stdout.isatty():
                sys.stdout.write("\x1b[?25h")  # a live display hides the cursor
            sys.stdout.flush()
            sys.stderr.write(text)
            sys.stderr.flush()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(1.0)
