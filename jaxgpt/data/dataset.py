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
    """Batches of each held-out set by its name; a new pass with every call. A part of a set has the
    name `val/PART`."""
    fingerprint: dict[str, Any]
    """All that decides the batches, in JSON values."""
    note: str
    """How much there is, on a terminal."""
    rows: int = 0
    """Rows of the training set, each of which is in one batch of an epoch."""
    records: dict[str, Sequence[Record]] = field(default_factory=dict)
    """The records of each set, `train` too, where they are records."""
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    """Bytes of text for each token to predict, by held-out set; empty if it is not text."""
    shares: dict[str, float] = field(default_factory=dict)
    """The share of each part, `val/PART`, in the mixture that `val` then is; they add up to 1."""
