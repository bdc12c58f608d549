"""Work done in threads, ahead of the one who asks for it."""

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
    """`map(function, inputs)` in order, with at most `depth` results in work or waiting.

    `inputs` is drawn in the caller's thread. An exception of `function` is raised where its result
    is asked for. Closing the iterator, or leaving it to the garbage collector, ends the threads.
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
    """`batch(start), batch(start + 1), ...`, each made in a thread while the one before is used."""
    return map_ahead(batch, count(start), workers=1, depth=depth + 1)
