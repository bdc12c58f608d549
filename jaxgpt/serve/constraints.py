"""Compiles constraints (choices, regular expressions, JSON schemas) beside all other work.

One thread compiles one constraint at a time, so that a burst of expensive constraints takes at most
one core, and the threads that parse other requests stay free.
"""

import asyncio
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxgpt.errors import InputError
from jaxgpt.generation.constrained import Guide, interruptible
from jaxgpt.serve.engine import STATES, Busy
from jaxgpt.tokenizer import Tokenizer

WAITING = 16
"""Constraints that wait while one is compiled, at most."""
GUIDES = 8
"""Compiled constraints in the cache, at most; one takes up to 2 MB and 4 bytes for each token."""
REFUSALS = 256
"""Refused constraints in the cache, at most; one takes its error message."""


class Constraint(NamedTuple):
    """What the generated text has to match."""

    field: str
    """The request's field that has it."""
    compile: Callable[..., Guide]
    """`choices`, `regex` or `json_schema` of `jaxgpt.generation.constrained`."""
    value: str
    """The argument of `compile`, as JSON."""
    ends: tuple[int, ...]
    """The token ids that end a text."""
    context: tuple[int, ...] | None = None
    """The ids before the text, see `jaxgpt.generation.constrained.choices`."""


class Compiler:
    """Compiles constraints for the requests of one event loop.

    Identical constraints are compiled once, also while the first is still waiting, and the last
    results are cached: guides as well as refusals. A constraint that no request waits for any more
    is removed from the queue, or interrupted if it is being compiled.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, "constraints")
        self._jobs: dict[Hashable, _Job] = {}
        self._guides = _Cache(GUIDES)
        self._refusals = _Cache(REFUSALS)

    async def compile(self, constraint: Constraint, deadline: float) -> Guide:
        """The guide of a constraint.

        Args:
            constraint: What to compile.
            deadline: When to give up, in seconds of `time.monotonic`.

        Raises:
            InputError: The constraint is invalid or too large.
            Busy: The queue is full.
            TimeoutError: It is not compiled at the deadline.
        """
        digest = hashlib.sha256(constraint.value.encode()).digest()
        key = constraint.compile, digest, constraint.ends, constraint.context
        if (message := self._refusals.get(key)) is not None:
            raise InputError(message)
        if (guide := self._guides.get(key)) is not None:
            return guide
        if (job := self._jobs.get(key)) is None:
            if len(self._jobs) > WAITING:
                raise Busy(f"a constraint is being compiled, and {WAITING} wait")
            job = _Job()
            compile_ = self._thread.submit(job.run, constraint, self._tokenizer)
            job.result = asyncio.wrap_future(compile_)
            self._jobs[key] = job
        job.requests += 1
        try:
            await asyncio.wait([job.result], timeout=max(deadline - time.monotonic(), 0))
            if not job.result.done():
                raise TimeoutError
            guide = job.result.result()
            self._guides.put(key, guide)
            return guide
        except InputError as error:
            self._refusals.put(key, str(error))
            raise
        finally:
            job.requests -= 1
            if job.result.done() or not job.requests:
                job.abandon()
                if self._jobs.get(key) is job:
                    del self._jobs[key]


@dataclass
class _Job:
    """A constraint that is compiled or waits for it, and how many requests want the result."""

    requests: int = 0
    result: Any = None
    abandoned: threading.Event = field(default_factory=threading.Event)

    def run(self, constraint: Constraint, tokenizer: Tokenizer) -> Guide:
        """Compiles it, in the compiler's thread."""
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
        if self.abandoned.is_set():
            raise _Abandoned

    def abandon(self) -> None:
        """Takes it out of the queue, or interrupts it; nothing if it is done."""
        self.result.cancel()
        self.abandoned.set()


class _Abandoned(Exception):
    """Nobody waits for the constraint that is being compiled."""


class _Cache:
    """The values that were used last, up to a number of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """The value of a key; None if it is not in the cache."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Hashable, value: Any) -> None:
        """Adds a value, and removes the one that was used longest ago if there are too many."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._most:
            self._values.popitem(last=False)
