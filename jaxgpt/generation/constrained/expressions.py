"""Regular expressions over characters, and their automata over UTF-8 bytes."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.tokenizer.base import encoded

LONGEST = 50_000
"""The most characters of a pattern, a schema, or all choices together."""
STEPS = 1_000_000
"""The most steps of building an automaton."""


def check_length(what: str, length: int) -> None:
    """Raises InputError if a text is too long."""
    if length > LONGEST:
        raise InputError(f"{what} {length:,} characters; shorten to {LONGEST:,} or less")


_check: ContextVar[Callable[[], None]] = ContextVar("check", default=lambda: None)


@contextmanager
def interruptible(check: Callable[[], None]) -> Iterator[None]:
    """While guides are compiled in the block, calls `check` often, whose exception stops them."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def short(value: object) -> str:
    """The beginning of a value, for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


# A set of characters is a tuple of sorted, disjoint ranges of code points.
Ranges = tuple[tuple[int, int], ...]


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The set of the characters in any of the ranges."""
    apart: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if apart and low <= apart[-1][1] + 1:
            apart[-1] = apart[-1][0], max(high, apart[-1][1])
        else:
            apart.append((low, high))
    return tuple(apart)


def others(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The complement of a set; surrogates are not characters."""
    left, start = [], 0
    for low, high in joined([*ranges, (0xD800, 0xDFFF), (0x110000, 0x110000)]):
        if start < low:
            left.append((start, low - 1))
        start = high + 1
    return tuple(left)


def characters_of(characters: str) -> Ranges:
    """The set of the characters of a text."""
    return joined((ord(character), ord(character)) for character in characters)


@cache
def category(letter: str, flags: int) -> Ranges:
    r"""The characters of \d, \s or \w."""
    every = "".join(map(chr, range(0x110000)))
    runs = re.finditer(rf"\{letter}+", every, flags)
    return tuple((run.start(), run.end() - 1) for run in runs)


ANY = others([])
NOTHING, EMPTY = 0, 1  # the nodes that match nothing, and the empty text

_Node = tuple[Any, ...]  # the kind of a node and its parts, see `Expressions`
_Target = tuple[int, int, int]  # the ends of a range of characters, and the state it leads to
_State = int | tuple[int, tuple[_Target, ...]]  # a node, or a place between bytes


class Expressions:
    """Regular expressions as numbered nodes; equal expressions have the same number.

    Nodes are ("chars", ranges), ("cat", a, b), ("alt", a, b, ...), ("both", a, b) (intersection)
    and ("repeat", a, least, most), where None is no bound. The states of an automaton are nodes:
    what remains to be matched."""

    def __init__(self) -> None:
        self._steps = 0
        self._check = _check.get()
        self._nodes: list[_Node] = [("alt",), ("empty",)]
        self._nullable = [False, True]
        self._numbers: dict[_Node, int] = {}
        self._moves: dict[int, list[tuple[int, int]]] = {}

    def _node(self, node: _Node, nullable: bool) -> int:
        number = self._numbers.setdefault(node, len(self._nodes))
        if number == len(self._nodes):
            self._nodes.append(node)
            self._nullable.append(nullable)
            self.count(len(node))
        return number

    def count(self, steps: int) -> None:
        """Counts steps. Raises InputError if there are too many."""
        self._check()
        self._steps += steps
        if self._steps > STEPS:
            raise InputError(
                "the guide is too complex; use fewer and smaller repetitions and alternatives"
            )

    def chars(self, ranges: Ranges) -> int:
        """One character of a set."""
        self.count(len(ranges))
        ranges = others(others(ranges))
        return self._node(("chars", ranges), False) if ranges else NOTHING

    def text(self, text: str) -> int:
        """A literal text."""
        encoded(text)
        return self.cat(*(self.chars(characters_of(character)) for character in text), EMPTY)

    def cat(self, *parts: int) -> int:
        """The concatenation of nodes."""
        *left, whole = parts
        for part in reversed(left):
            # The left part of a "cat" is never a "cat", so that equal concatenations have one node.
            heads = []
            while self._nodes[part][0] == "cat":
                _, head, part = self._nodes[part]
                heads.append(head)
            self.count(len(heads))
            for head in (part, *reversed(heads)):
                if head == NOTHING or whole == NOTHING:
                    whole = NOTHING
                elif whole == EMPTY:
                    whole = head
                elif head != EMPTY:
                    nullable = self._nullable[head] and self._nullable[whole]
                    whole = self._node(("cat", head, whole), nullable)
        return whole

    def alt(self, parts: Iterable[int]) -> int:
        """The union of nodes."""
        flat: set[int] = set()
        for part in parts:
            inner = self._nodes[part][1:] if self._nodes[part][0] == "alt" else (part,)
            self.count(len(inner))
            flat.update(inner)
        if EMPTY in flat and any(self._nullable[part] for part in flat if part != EMPTY):
            flat.remove(EMPTY)
        if len(flat) < 2:
            return flat.pop() if flat else NOTHING
        return self._node(("alt", *sorted(flat)), any(self._nullable[part] for part in flat))

    def both(self, a: int, b: int) -> int:
        """The intersection of two nodes."""
        a, b = sorted((a, b))
        if a in (NOTHING, b):
            return a
        return self._node(("both", a, b), self._nullable[a] and self._nullable[b])

    def repeat(self, part: int, least: int, most: int | None) -> int:
        """A node repeated `least` to `most` times."""
        if self._nullable[part]:
            least = 0
        if most == 0 or part == EMPTY:
            return EMPTY
        if least == most == 1:
            return part
        if part == NOTHING:
            return EMPTY if least == 0 else NOTHING
        if self._nodes[part][0] == "repeat" and self._nodes[part][2:] == (0, None):
            return part
        return self._node(("repeat", part, least, most), least == 0)

    def optional(self, part: int) -> int:
        """A node once or not at all."""
        return self.alt([EMPTY, part])

    def automaton(self, root: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The automaton of a node over bytes.

        Between the bytes of a character, a state is the number of bytes to come and where they
        lead.

        Returns:
            The state after each byte, int32 [S, 256] with -1 for none; and whether each state is
            complete, bool [S].
        """
        self._divide()
        keys: list[_State] = [root]
        numbers: dict[_State, int] = {root: 0}

        def state(key: _State) -> int:
            number = numbers.setdefault(key, len(keys))
            if number == len(keys):
                keys.append(key)
                if len(keys) >= limit:
                    raise InputError(
                        f"the guide has more than limit={limit} states; use shorter repetitions "
                        "(maxLength, maxItems, {m,n}), fewer alternatives, or a higher limit"
                    )
            return number

        def fill(row: np.ndarray, base: int, level: int, targets: Sequence[_Target]) -> None:
            """Transitions for the bytes from `base` on, each followed by `level` more."""
            self.count(len(targets))
            for first, last, rest in _blocks(targets, 6 * level):
                row[base + first : base + last + 1] = state((level, rest)) if level else rest[0][2]

        rows: list[np.ndarray] = []
        while len(rows) < len(keys):
            key = keys[len(rows)]
            row = np.full(256, -1, np.int32)
            rows.append(row)
            if isinstance(key, tuple):
                fill(row, 0x80, key[0] - 1, key[1])
                continue
            targets = []
            for mask, node in self._after(key):
                target = state(node)
                targets += [(low, high, target) for low, high in self._ranges(mask)]
            targets.sort()
            for level, (base, low, high) in enumerate(_UTF8):
                fill(row, base, level, _clipped(targets, low, high))
        complete = [isinstance(key, int) and self._nullable[key] for key in keys]
        return np.array(rows), np.array(complete)

    def _divide(self) -> None:
        """Divides all characters into classes that no set of the node splits; each is a bit of
        masks."""
        sets = [number for number, node in enumerate(self._nodes) if node[0] == "chars"]
        changes: dict[int, int] = {}
        for bit, number in enumerate(sets):
            for low, high in self._nodes[number][1]:
                changes[low] = changes.get(low, 0) ^ 1 << bit
                changes[high + 1] = changes.get(high + 1, 0) ^ 1 << bit
        classes: dict[int, list[tuple[int, int]]] = {}
        inside = start = 0
        for point in sorted(changes):
            if inside:
                classes.setdefault(inside, []).append((start, point - 1))
            inside, start = inside ^ changes[point], point
        self._classes = list(classes.values())
        self._masks = dict.fromkeys(sets, 0)
        for number, inside in enumerate(classes):
            for bit in _bits(inside):
                self._masks[sets[bit]] |= 1 << number
                self.count(1)

    def _ranges(self, mask: int) -> Iterator[tuple[int, int]]:
        for number in _bits(mask):
            yield from self._classes[number]

    def _after(self, number: int) -> list[tuple[int, int]]:
        """The derivatives of a node: disjoint masks of classes, and the node that remains for
        each."""
        if (known := self._moves.get(number)) is not None:
            return known
        kind, *parts = self._nodes[number]
        if kind == "chars":
            moves = [(self._masks[number], EMPTY)]
        elif kind == "cat":
            head, rest = parts
            moves = [(mask, self.cat(node, rest)) for mask, node in self._after(head)]
            if self._nullable[head]:
                moves = self._merged([*moves, *self._after(rest)])
        elif kind == "repeat":
            part, least, most = parts
            rest = self.repeat(part, max(least - 1, 0), None if most is None else most - 1)
            moves = [(mask, self.cat(node, rest)) for mask, node in self._after(part)]
        elif kind == "both":
            a, b = map(self._after, parts)
            self.count(len(a) * len(b))
            pairs = ((m & n, self.both(x, y)) for m, x in a for n, y in b if m & n)
            moves = self._merged([(mask, node) for mask, node in pairs if node != NOTHING])
        else:
            moves = self._merged([move for part in parts for move in self._after(part)])
        self._moves[number] = moves
        return moves

    def _merged(self, moves: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The same moves with disjoint masks."""
        pieces: list[tuple[int, list[int]]] = []
        for mask, node in moves:
            self.count(len(pieces) + 1)
            for i, (other, nodes) in enumerate(pieces):
                if both := mask & other:
                    if both != other:
                        pieces[i] = both, [*nodes]
                        pieces.append((other ^ both, nodes))
                    pieces[i][1].append(node)
                    mask ^= both
            if mask:
                pieces.append((mask, [node]))
        merged: dict[int, int] = {}
        for mask, nodes in pieces:
            node = self.alt(nodes)
            merged[node] = merged.get(node, 0) | mask
        return [(mask, node) for node, mask in merged.items()]


def _bits(mask: int) -> Iterator[int]:
    digits = bin(mask)[:1:-1]
    bit = digits.find("1")
    while bit >= 0:
        yield bit
        bit = digits.find("1", bit + 1)


# For characters of one to four bytes: the prefix of the first byte, and their range.
_UTF8 = (
    (0x00, 0x00, 0x7F),
    (0xC0, 0x80, 0x7FF),
    (0xE0, 0x800, 0xFFFF),
    (0xF0, 0x10000, 0x10FFFF),
)


def _clipped(targets: Sequence[_Target], low: int, high: int) -> list[_Target]:
    return [
        (max(first, low), min(last, high), target)
        for first, last, target in targets
        if first <= high and low <= last
    ]


def _blocks(
    targets: Sequence[_Target], shift: int
) -> Iterator[tuple[int, int, tuple[_Target, ...]]]:
    """Ranges of the upper bits, and the targets of the `shift` bits below them."""
    full = (1 << shift) - 1
    blocks: dict[int, list[_Target]] = {}
    for low, high, target in targets:
        first, last = low >> shift, high >> shift
        if first < last and low & full:
            blocks.setdefault(first, []).append((low & full, full, target))
            first, low = first + 1, (first + 1) << shift
        if first < last and high & full != full:
            blocks.setdefault(last, []).append((0, high & full, target))
            last, high = last - 1, (last << shift) - 1
        if first < last:
            yield first, last, ((0, full, target),)
        else:
            blocks.setdefault(first, []).append((low & full, high & full, target))
    for block, parts in blocks.items():
        joined: list[_Target] = []
        for low, high, target in sorted(parts):
            if joined and joined[-1][1:] == (low - 1, target):
                low = joined.pop()[0]
            joined.append((low, high, target))
        yield block, block, tuple(joined)
