"""Prefetching: computes the next items in background threads while the current one is used."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def map_ahead(
    function: Callable[[In], Out], inputs: Iterable[In], workers: int, depth: int
) -> Generator[Out, None, None]:
    """Computes `map(function, inputs)` in background threads, in order.

    Args:
        function: The function, which is called in the threads. An exception that it raises is
            raised again when its result is next.
        inputs: Its inputs, which are iterated in the caller's thread.
        workers: Number of threads.
        depth: Maximum number of results that are computed or waiting at a time.

    Yields:
        The results. Closing or garbage-collecting the iterator ends the threads.
    """
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Out]] = deque()
    try:
        for given in inputs:
            waiting.append(pool.submit(function, given))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def prefetch(
    batch: Callable[[int], Out], start: int = 0, depth: int = 2
) -> Generator[Out, None, None]:
    """Yields `batch(start), batch(start + 1), ...`, made in a thread up to `depth` ahead."""
    return map_ahead(batch, count(start), workers=1, depth=depth + 1)
