"""Waiting for a server, but not for long."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

Answer = TypeVar("Answer")


def answer_within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """Calls a function that asks a server, and gives up after some time.

    The timeouts of HTTP libraries do not apply to the DNS look-up, which may take minutes without
    network, so the function runs in a daemon thread, which is left behind.

    Args:
        seconds: The longest time to wait.
        ask: The function.

    Returns:
        The function's result; its exceptions are raised.

    Raises:
        TimeoutError: There is no result yet.
    """
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    return answer.result()
