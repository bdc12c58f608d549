"""Compiles constraints (choices, regular expressions, JSON schemas) in a thread of their own.

The thread compiles one constraint at a time, so a burst of expensive constraints uses at most one
core, and the threads that parse other requests stay free.
"""

import asyncio
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

from jaxgpt.errors import InputError
from jaxgpt.generation.constrained import Guide, interruptible
from jaxgpt.serve.engine import STATES, Busy
from jaxgpt.tokenizer import Tokenizer

V = TypeVar("V")

WAITING = 16
"""The most constraints that wait while another is compiled."""
GUIDES = 8
"""The most compiled constraints in the cache; each takes up to 2 MB plus 4 bytes per token of the
vocabulary."""
ERRORS = 256
"""The most error messages of invalid constraints in the cache."""


class Constraint(NamedTuple):
    """A constraint on the generated text, not yet compiled."""

    field: str
    """The request's field that holds the constraint."""
    compile: Callable[..., Guide]
    """`choices`, `regex` or `json_schema` of `jaxgpt.generation.constrained`."""
    value: str
    """The argument of `compile`, as JSON."""
    ends: tuple[int, ...]
    """The token ids that end a text."""
    context: tuple[int, ...] | None = None
    """The token ids before the text, see `jaxgpt.generation.constrained.choices`."""


class Compiler:
    """Compiles constraints for the requests of one event loop.

    Identical constraints are compiled once, even if they arrive while the first is still waiting.
    The most recent results are cached, both compiled guides and errors. A constraint that no
    request waits for any more is removed from the queue, or interrupted if it is being compiled.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, "constraints")
        self._jobs: dict[Hashable, _Job] = {}
        self._guides = _Cache[Guide](GUIDES)
        self._errors = _Cache[str](ERRORS)

    async def compile(self, constraint: Constraint, deadline: float) -> Guide:
        """Compiles a constraint, or returns it from the cache.

        Args:
            constraint: The constraint.
            deadline: When to give up, in seconds of `time.monotonic`.

        Raises:
            InputError: The constraint is invalid or too large.
            Busy: The queue is full.
            TimeoutError: The constraint is not compiled at the deadline.
        """
        digest = hashlib.sha256(constraint.value.encode()).digest()
        key = constraint.compile, digest, constraint.ends, constraint.context
        if (message := self._errors.get(key)) is not None:
            raise InputError(message)
        if (guide := self._guides.get(key)) is not None:
            return guide
        if (job := self._jobs.get(key)) is None:
            if len(self._jobs) > WAITING:
                raise Busy(f"a constraint is being compiled, and {WAITING} are waiting")
            job = self._jobs[key] = _Job(self._thread, constraint, self._tokenizer)
        job.requests += 1
        try:
            await asyncio.wait([job.result], timeout=max(deadline - time.monotonic(), 0))
            if not job.result.done():
                raise TimeoutError
            guide = job.result.result()
            self._guides.put(key, guide)
            return guide
        except InputError as error:
            self._errors.put(key, str(error))
            raise
        finally:
            job.requests -= 1
            if job.result.done() or not job.requests:
                job.abandon()
                if self._jobs.get(key) is job:
                    del self._jobs[key]


class _Job:
    """A constraint in the queue or being compiled."""

    def __init__(
        self, thread: ThreadPoolExecutor, constraint: Constraint, tokenizer: Tokenizer
    ) -> None:
        self.requests = 0
        """The number of requests that wait for the result."""
        self._abandoned = threading.Event()
        self.result = asyncio.wrap_future(thread.submit(self._run, constraint, tokenizer))

    def _run(self, constraint: Constraint, tokenizer: Tokenizer) -> Guide:
        """Compiles the constraint; runs in the compiler's thread."""
        with interruptible(self._check):
            value = json.loads(constraint.value)
            return constraint.compile(
                tokenizer,
                value,
                ends=constraint.ends,
                limit=STATES,
                context=constraint.context,
            )

    def _check(self) -> None:
        if self._abandoned.is_set():
            raise _Abandoned

    def abandon(self) -> None:
        """Removes the job from the queue, or interrupts it; has no effect if it is done."""
        self.result.cancel()
        self._abandoned.set()


class _Abandoned(Exception):
    """Interrupts the compilation of a constraint that no request waits for."""


class _Cache(Generic[V]):
    """A cache that keeps the most recently used values (LRU)."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable) -> V | None:
        """Returns the value of a key, or None if it is not in the cache."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Hashable, value: V) -> None:
        """Adds a value, and evicts the least recently used one if the cache is full."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._most:
            self._values.popitem(last=False)
