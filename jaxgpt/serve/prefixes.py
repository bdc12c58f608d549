"""Which prompts the rows of the KV cache hold, so that prompts that begin alike reuse them.

A row keeps what it holds after its text has ended, until another prompt needs the row; the least
recently used row is overwritten first. Only whole chunks of a prompt are reused, and the rest of it
if the prompts are the same. The same program has then computed the same numbers from the same
numbers: reuse changes no bit of an answer. That is also why the tokens of an answer, which a
decoding step has computed, are not reused.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Ring(NamedTuple):
    """The cache of a layer with a sliding window, where new tokens overwrite the oldest."""

    window: int
    """The number of tokens, with itself, that a token attends to."""
    slots: int
    """The positions that the cache has room for."""


@dataclass
class _Row:
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """The first tokens of a prompt, whose keys and values are in the row."""
    end: int = 0
    """The first position after all that have been written."""
    used: int = 0
    """When a text last began or ended, in the order of such events; 0: never."""


class Prefixes:
    """The prompts in the rows of a KV cache.

    Args:
        rows: The number of rows.
        chunk: The number of tokens in a chunk of a prompt.
        ring: Of the layers with a sliding window, if their cache is smaller than the others'.
    """

    def __init__(self, rows: int, chunk: int, ring: Ring | None = None) -> None:
        self._rows = [_Row() for _ in range(rows)]
        self._chunk, self._ring = chunk, ring
        self._events = 0

    def take(self, free: Collection[int], tokens: np.ndarray) -> tuple[int, int]:
        """Chooses the row for a new prompt.

        A row whose prompt is continued keeps all that it holds, so the longest such one is chosen;
        otherwise it is the least recently used row.

        Args:
            free: The rows to choose from, at least one.
            tokens: The tokens to prefill.

        Returns:
            The row, and the number of tokens that are in it already.
        """
        shared = {row: self._shared(row, tokens) for row in free}
        whole = [row for row in free if shared[row] and shared[row] >= self._chunks(row)]
        if whole:
            row = max(whole, key=lambda row: shared[row])
        else:
            row = min(free, key=lambda row: self._rows[row].used)
        self.touch(row)
        self._rows[row].tokens = tokens[: shared[row]]
        if not shared[row]:
            self._rows[row].end = 0
        return row, shared[row]

    def find(self, tokens: np.ndarray) -> tuple[int, int]:
        """The row that holds most of the first tokens of a prompt, and the number of these."""
        shared = [self._shared(row, tokens) for row in range(len(self._rows))]
        row = int(np.argmax(shared))
        return row, shared[row]

    def copied(self, source: int, row: int, tokens: np.ndarray) -> None:
        """Notes that a row has these tokens from another one."""
        self._rows[row].end = self._rows[source].end
        self._rows[row].tokens = tokens

    def wrote(self, row: int, end: int, tokens: np.ndarray | None = None) -> None:
        """Notes that a row has been written up to a position, and what it holds if that changed."""
        self._rows[row].end = max(self._rows[row].end, end)
        if tokens is not None:
            self._rows[row].tokens = tokens

    def touch(self, row: int) -> None:
        """Makes a row the most recently used one."""
        self._events += 1
        self._rows[row].used = self._events

    def _chunks(self, row: int) -> int:
        """The tokens of a row in whole chunks."""
        held = len(self._rows[row].tokens)
        return held - held % self._chunk

    def _shared(self, row: int, tokens: np.ndarray) -> int:
        """How many of a prompt's first tokens can be reused from a row."""
        held = self._rows[row]
        most = min(len(held.tokens), len(tokens))
        differ = held.tokens[:most] != tokens[:most]
        same = int(differ.argmax()) if differ.any() else most
        if not same == len(tokens) == len(held.tokens):
            same -= same % self._chunk
        if self._ring and same < held.end - self._ring.slots + self._ring.window - 1:
            return 0  # a token that the next one attends to has been overwritten
        return same
