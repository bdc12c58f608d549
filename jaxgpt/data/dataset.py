"""What training and evaluation need to know of data, whatever it was made from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxgpt.data.records import Record

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Dataset:
    """Batches by number, and what is held out."""

    batch: Callable[[int], Batch]
    """Training batch k, this process's rows: the same whenever it is asked for."""
    held_out: dict[str, Callable[[], Iterator[Batch]]]
    """Batches of each held-out set by its name, `val` first; a new pass with every call."""
    fingerprint: dict[str, Any]
    """All that decides the batches, in JSON values."""
    note: str
    """How much there is, on a terminal."""
    records: dict[str, Sequence[Record]] = field(default_factory=dict)
    """The records of each set, `train` too, where they are records."""
    tokens_per_byte: float = 0.0
    """Tokens to predict for each byte of held-out text; 0: not text."""
