"""The interface between data and training: a `Dataset`, made from text or from records."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxgpt.data.records import Record

Batch = dict[str, np.ndarray]

Fingerprint = dict[str, Any]
"""JSON values of everything that determines the batches of a run."""


@dataclass(frozen=True)
class Dataset:
    """Training batches by number, and the held-out sets."""

    batch: Callable[[int], Batch]
    """Returns this process's rows of training batch k; a pure function of k."""
    held_out: dict[str, Callable[[], Iterator[Batch]]]
    """For each held-out set, by name, a function that starts a new pass over its batches. The
    parts of a set are named `val/PART`."""
    fingerprint: Fingerprint
    note: str
    """The sizes of the sets, for the terminal."""
    rows: int = 0
    """Number of rows in an epoch of the training set."""
    records: dict[str, Sequence[Record]] = field(default_factory=dict)
    """The records of each set, including `train`; empty for text."""
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    """Average bytes of text per target token of each held-out set; empty for records."""
    shares: dict[str, float] = field(default_factory=dict)
    """If `val` is a mixture of the parts `val/PART`: the fraction of each; they add up to 1."""
    state: Callable[[], dict[str, Any]] = dict
    """JSON values that a checkpoint keeps, so that a resumed run need not read again what earlier
    batches were made of."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set it to end a wait for data: a batch that must be downloaded then raises TrainingError."""
