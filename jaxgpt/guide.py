r"""What a model may write: one of some choices, a regular expression, or JSON of a schema.

    guide = choices(tokenizer, ["yes", "no"])
    guide.allowed(0)                             # bool[V]: tokens that begin "yes" or "no"
    state = guide.after(0, tokenizer.encode("yes")[0])

A guide is two tables, so that a decoding loop can follow it on the device: a token has a class, and
a state and a class give the next state. Every text that is begun can be finished with the tokens
there are, and an end token is allowed exactly where the text is complete.

The text is what the tokens after a prompt add to it, their bytes in a row. A token may hold part of
a character, and whatever tokens spell the text are allowed, not only those that encoding it gives.

An expression becomes states by its derivatives (Brzozowski 1964) by classes of characters (Owens et
al. 2009, "Regular-expression derivatives re-examined"), these become UTF-8, and its bytes become
the tokenizer's tokens. Steps and states are counted: what is too complex ends in an InputError,
whoever wrote it.
"""

import importlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, NoReturn
from urllib.parse import unquote

import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.tokenizer.base import Tokenizer, encoded

LIMIT = 4096
"""States of a guide, at most, where `limit` does not say otherwise."""
LARGEST_LIMIT = 1 << 14
"""The largest `limit`: what is known of each two states takes a byte."""
LONGEST = 50_000
"""Characters of a pattern, a schema, or all choices together, at most."""
STEPS = 1_000_000
"""Steps from an expression to its states, at most."""
LARGEST_TABLE = 1 << 23
"""States times classes, at most: 32 MB."""
DEPTH = 3
"""Arrays and objects in each other, at most, where a schema leaves open what a value is."""

_NEVER, _END = 0, 1  # the classes of tokens that are never allowed, and of those that end


@dataclass(frozen=True, eq=False)
class Guide:
    """A deterministic automaton over a tokenizer's ids. State 0 is the start, the last is the end.

    Class 0 is that of tokens that are never allowed, class 1 that of the end tokens.
    """

    classes_V: np.ndarray
    """int32: the class of each id; ids that lead from every state to the same one share it."""
    next_SC: np.ndarray
    """int32: the state after a token of a class; -1: not allowed."""

    def allowed(self, state: int) -> np.ndarray:
        """Which ids may follow in a state, bool[V]."""
        return self.next_SC[state, self.classes_V] >= 0

    def after(self, state: int, token: int) -> int:
        """The state after a token; -1: it is not allowed."""
        return int(self.next_SC[state, self.classes_V[token]])


def choices(
    tokenizer: Tokenizer,
    options: Sequence[str],
    *,
    ends: Sequence[int] | None = None,
    limit: int = LIMIT,
) -> Guide:
    """One of some texts. `ends` are the ids that end it: if None, the tokenizer's eot and eos.

    Raises InputError for no choices, an empty one, one given twice, one that the tokenizer has no
    tokens for, and more than `limit` states, about one for each character.
    """
    if isinstance(options, str) or not options:
        raise InputError(f"choices={options!r}; give a list with at least one text")
    seen: set[str] = set()
    for option in options:
        if not isinstance(option, str) or not option:
            raise InputError(f"{option!r} is among the choices; give texts, none of them empty")
        if option in seen:
            raise InputError(f"{_short(option)} is twice among the choices; give it once")
        seen.add(option)
    _check_length("the choices have", sum(map(len, options)))
    graph = _Expressions()
    guide = _guide(graph, graph.alt(map(graph.text, options)), tokenizer, ends, limit)
    pieces = {tokenizer.pieces[token] for token in np.flatnonzero(guide.classes_V > _END).tolist()}
    for option in options:
        if not _spells(pieces, option.encode()):
            raise InputError(f"the tokenizer has no tokens for {_short(option)}; leave it out")
    return guide


def regex(
    tokenizer: Tokenizer,
    pattern: str,
    *,
    ends: Sequence[int] | None = None,
    limit: int = LIMIT,
) -> Guide:
    r"""Text that a regular expression matches as a whole: `re.fullmatch(pattern, text)`.

    `ends` as in `choices`. No finite automaton follows references to groups, and none here what
    looks ahead or behind, `\b`, atomic groups and possessive repetitions, flags but (?s) and (?x),
    and ^ and $ inside of the pattern. Raises InputError for these, for what is no pattern, for one
    that the tokenizer can write no match of, and for more than `limit` states.
    """
    if not isinstance(pattern, str):
        raise InputError(f"pattern={pattern!r}; give the text of a regular expression")
    _check_length("the pattern has", len(pattern))
    graph = _Expressions()
    with _bounded_depth("the pattern"):
        return _guide(graph, _Pattern(graph).read(pattern), tokenizer, ends, limit)


def json_schema(
    tokenizer: Tokenizer,
    schema: dict[str, Any] | bool | str,
    *,
    ends: Sequence[int] | None = None,
    limit: int = LIMIT,
) -> Guide:
    r"""JSON that a schema (draft 2020-12), or the text of one, allows. `ends` as in `choices`.

    Of the many ways to write a value few are left to the model: after a colon or a comma a space or
    none, and no other white space; properties in the schema's order, those not required or left
    out, and no others where it names some; in strings every character as it is, but for the escapes
    `\" \\ \b \f \n \r \t`; exponents of two digits. Where a schema leaves values open, arrays and
    objects are DEPTH deep at most.

    Known are type, enum, const, anyOf, oneOf of what types or required constants tell apart, allOf
    of one, $ref within the schema but not to what it is in; minLength, maxLength, pattern, format
    (date, time, date-time, uuid, email, ipv4); minimum, maximum, exclusiveMinimum and
    exclusiveMaximum, whole ones for numbers; items, prefixItems, minItems, maxItems; properties,
    required, additionalProperties. Raises InputError for every other keyword but annotations, for
    a schema that the tokenizer can write no value of, and for more than `limit` states.
    """
    with _bounded_depth("the schema"):
        graph = _Expressions()
        parsed = _parsed(schema)
        return _guide(graph, _Schema(graph, parsed).value(parsed, "#"), tokenizer, ends, limit)


def stacked(guides: Sequence[Guide | None], V: int) -> tuple[np.ndarray, np.ndarray]:
    """The tables of a batch's rows: classes, int32[B, V], and next states, int32[B, S, C].

    None is a row where everything is allowed, all in state 0. S and C are powers of two that hold
    every guide of the batch, so that a loop is compiled for few sizes. `V` may be larger than the
    tokenizer's vocabulary; ids beyond that are never allowed in a guided row. Raises InputError
    where it is smaller.
    """
    given = [guide for guide in guides if guide is not None]
    if (ids := max((len(guide.classes_V) for guide in given), default=0)) > V:
        raise InputError(f"V={V}, but a guide has {ids} ids; set it to that or more")
    S, C = (_power(max((guide.next_SC.shape[i] for guide in given), default=1)) for i in (0, 1))
    classes_BV = np.full((len(guides), V), _NEVER, np.int32)
    next_BSC = np.full((len(guides), S, C), -1, np.int32)
    for row, guide in enumerate(guides):
        if guide is None:
            next_BSC[row, 0] = 0
        else:
            states, classes = guide.next_SC.shape
            classes_BV[row, : len(guide.classes_V)] = guide.classes_V
            next_BSC[row, :states, :classes] = guide.next_SC
    return classes_BV, next_BSC


def _power(size: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (size - 1).bit_length()


def _check_length(what: str, length: int) -> None:
    if length > LONGEST:
        raise InputError(f"{what} {length:,} characters; shorten to {LONGEST:,} or less")


@contextmanager
def _bounded_depth(what: str) -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise InputError(f"{what} is nested too deep; make it flatter") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


# A set of characters is the ranges of its code points: sorted, and apart from each other.
_Ranges = tuple[tuple[int, int], ...]


def _joined(ranges: Iterable[tuple[int, int]]) -> _Ranges:
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(high, joined[-1][1])
        else:
            joined.append((low, high))
    return tuple(joined)


def _others(ranges: Iterable[tuple[int, int]]) -> _Ranges:
    """All other characters; halves of surrogate pairs are none."""
    others, start = [], 0
    for low, high in _joined([*ranges, (0xD800, 0xDFFF), (0x110000, 0x110000)]):
        if start < low:
            others.append((start, low - 1))
        start = high + 1
    return tuple(others)


def _of(characters: str) -> _Ranges:
    return _joined((ord(character), ord(character)) for character in characters)


@cache
def _category(letter: str, flags: int) -> _Ranges:
    r"""The characters of \d, \s or \w."""
    every = "".join(map(chr, range(0x110000)))
    runs = re.finditer(rf"\{letter}+", every, flags)
    return tuple((run.start(), run.end() - 1) for run in runs)


_ANY = _others([])
_NOTHING, _EMPTY = 0, 1  # the expressions of no text at all, and of the empty text


class _Expressions:
    """Regular expressions, known by number: equal ones have the same.

    They are ("chars", ranges), ("cat", a, b), ("alt", a, b, ...), ("both", a, b) and
    ("repeat", a, least, most), with None for no bound. An automaton's states are expressions: what
    is left to match.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._nodes: list[tuple[Any, ...]] = [("alt",), ("empty",)]
        self._nullable = [False, True]
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._moves: dict[int, list[tuple[int, int]]] = {}

    def _node(self, node: tuple[Any, ...], nullable: bool) -> int:
        number = self._numbers.setdefault(node, len(self._nodes))
        if number == len(self._nodes):
            self._nodes.append(node)
            self._nullable.append(nullable)
            self.count(len(node))
        return number

    def count(self, steps: int) -> None:
        """Counts steps; InputError where they are too many."""
        self._steps += steps
        if self._steps > STEPS:
            raise InputError(
                "the guide is too complex; use fewer and smaller repetitions and alternatives"
            )

    def chars(self, ranges: _Ranges) -> int:
        """One character of a set."""
        self.count(len(ranges))
        ranges = _others(_others(ranges))
        return self._node(("chars", ranges), False) if ranges else _NOTHING

    def text(self, text: str) -> int:
        """A text as it is."""
        encoded(text)
        return self.cat(*(self.chars(_of(character)) for character in text), _EMPTY)

    def cat(self, *parts: int) -> int:
        """One after the other."""
        *left, whole = parts
        for part in reversed(left):
            # A "cat" is never left of another, so that equal rows of parts are equal.
            heads = []
            while self._nodes[part][0] == "cat":
                _, head, part = self._nodes[part]
                heads.append(head)
            self.count(len(heads))
            for head in (part, *reversed(heads)):
                if head == _NOTHING or whole == _NOTHING:
                    whole = _NOTHING
                elif whole == _EMPTY:
                    whole = head
                elif head != _EMPTY:
                    nullable = self._nullable[head] and self._nullable[whole]
                    whole = self._node(("cat", head, whole), nullable)
        return whole

    def alt(self, parts: Iterable[int]) -> int:
        """One of them."""
        flat: set[int] = set()
        for part in parts:
            inner = self._nodes[part][1:] if self._nodes[part][0] == "alt" else (part,)
            self.count(len(inner))
            flat.update(inner)
        if _EMPTY in flat and any(self._nullable[part] for part in flat if part != _EMPTY):
            flat.remove(_EMPTY)
        if len(flat) < 2:
            return flat.pop() if flat else _NOTHING
        return self._node(("alt", *sorted(flat)), any(self._nullable[part] for part in flat))

    def both(self, a: int, b: int) -> int:
        """What is the one and the other."""
        a, b = sorted((a, b))
        if a in (_NOTHING, b):
            return a
        return self._node(("both", a, b), self._nullable[a] and self._nullable[b])

    def repeat(self, part: int, least: int, most: int | None) -> int:
        """`least` to `most` times."""
        if self._nullable[part]:
            least = 0
        if most == 0 or part == _EMPTY:
            return _EMPTY
        if least == most == 1:
            return part
        if part == _NOTHING:
            return _EMPTY if least == 0 else _NOTHING
        if self._nodes[part][0] == "repeat" and self._nodes[part][2:] == (0, None):
            return part
        return self._node(("repeat", part, least, most), least == 0)

    def optional(self, part: int) -> int:
        """Once or not."""
        return self.alt([_EMPTY, part])

    def automaton(self, root: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The states after bytes, int32[S, 256] with -1 for none, and which are complete, bool[S].

        Between the bytes of a character a state is how many are to come, and where they lead.
        """
        self._divide()
        keys: list[Any] = [root]
        numbers = {root: 0}

        def state(key: Any) -> int:
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
            """Bytes from `base` on; `level` more follow each."""
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
        """Divides all characters into classes that no set tells apart; a bit of masks each."""
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
        """What is left after a character: masks of classes, apart from each other, and nodes."""
        if (known := self._moves.get(number)) is not None:
            return known
        kind, *parts = self._nodes[number]
        if kind == "chars":
            moves = [(self._masks[number], _EMPTY)]
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
            moves = self._merged([(mask, node) for mask, node in pairs if node != _NOTHING])
        else:
            moves = self._merged([move for part in parts for move in self._after(part)])
        self._moves[number] = moves
        return moves

    def _merged(self, moves: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Moves with masks apart from each other, from any."""
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


_Target = tuple[int, int, int]  # characters from and to, and the state they lead to

# For characters of one to four bytes: what is added to the bits of the first, and their range.
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
    """The upper bits, from and to, and the targets of the `shift` bits below them."""
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


_STARTS, _FINISHES = {"AT_BEGINNING", "AT_BEGINNING_STRING"}, {"AT_END", "AT_END_STRING"}
_GROUPS = {"SUBPATTERN", "BRANCH"}
_UNSUPPORTED = {
    **dict.fromkeys(("ASSERT", "ASSERT_NOT", "FAILURE"), "a look ahead or behind"),
    **dict.fromkeys(("GROUPREF", "GROUPREF_EXISTS"), "a reference to a group"),
    **dict.fromkeys(_STARTS | _FINISHES, "^ or $ inside of it"),
    **dict.fromkeys(("AT_BOUNDARY", "AT_NON_BOUNDARY"), "a boundary of words"),
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repetition",
}


class _Pattern:
    """Reads regular expressions, with Python's own parser.

    `chars` makes the node of a set of characters, and `around` is what may stand at an end that the
    pattern does not mark with ^ or $. With `strict` no character matches that ECMA-262 and Python
    take differently.
    """

    def __init__(
        self,
        graph: _Expressions,
        chars: Callable[[_Ranges], int] | None = None,
        around: int = _EMPTY,
        strict: bool = False,
    ) -> None:
        self.graph = graph
        self.chars = chars or graph.chars
        self.around = around
        self.strict = strict

    def read(self, pattern: str) -> int:
        """The node of a pattern."""
        encoded(pattern)
        self.pattern = pattern
        try:
            parsed = _parser().parse(pattern)
        except (re.error, OverflowError, FutureWarning) as error:
            raise InputError(f"{_short(pattern)} is no regular expression: {error}") from None
        flags = re.RegexFlag(parsed.state.flags) & ~(re.UNICODE | re.VERBOSE)
        if flags & ~re.DOTALL:
            self._refuse(f"flags ({flags & ~re.DOTALL!r})")
        newlines = "\n\r\u2028\u2029" if self.strict else "\n"
        self.dot = _ANY if flags else _others(_of(newlines))
        return self._row(list(parsed), True, True)

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(f"{_short(self.pattern)} has {what}, which no guide follows; do without")

    def _row(self, items: list[Any], first: bool, last: bool) -> int:
        """One item after the other; `first`, `last`: at an end, where ^ and $ may stand."""
        begins = ends = 0
        if first:
            begins = next(
                (i for i, item in enumerate(items) if _at(item) not in _STARTS), len(items)
            )
            items = items[begins:]
        if last:
            back = reversed(items)
            ends = next(
                (i for i, item in enumerate(back) if _at(item) not in _FINISHES), len(items)
            )
            items = items[: len(items) - ends]
        first, last = first and not begins, last and not ends
        # A group at an end may have ^ or $ in some of its alternatives.
        enters = first and bool(items) and items[0][0].name in _GROUPS
        leaves = last and bool(items) and items[-1][0].name in _GROUPS
        nodes = [
            self._item(op.name, value, enters and i == 0, leaves and i == len(items) - 1)
            for i, (op, value) in enumerate(items)
        ]
        before = self.around if first and not enters else _EMPTY
        after = self.around if last and not leaves else _EMPTY
        return self.graph.cat(before, *nodes, after)

    def _item(self, kind: str, value: Any, first: bool, last: bool) -> int:
        match kind:
            case "LITERAL":
                return self.chars(_of(chr(value)))
            case "NOT_LITERAL":
                return self.chars(_others(_of(chr(value))))
            case "ANY":
                return self.chars(self.dot)
            case "IN":
                return self.chars(self._set(value))
            case "BRANCH":
                return self.graph.alt([self._row(list(row), first, last) for row in value[1]])
            case "SUBPATTERN":
                _, added, removed, row = value
                if added or removed:
                    self._refuse("flags")
                return self._row(list(row), first, last)
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, row = value
                part = self._row(list(row), False, False)
                return self.graph.repeat(part, least, None if most == _parser().MAXREPEAT else most)
            case "AT":
                kind = value.name
        self._refuse(_UNSUPPORTED.get(kind, kind))

    def _set(self, members: list[Any]) -> _Ranges:
        """The characters of [...]."""
        negated = members[0][0].name == "NEGATE"
        ranges: list[tuple[int, int]] = []
        for op, value in members[negated:]:
            if op.name == "CATEGORY":
                ranges += self._category(value.name, negated)
            else:
                ranges.append(value if op.name == "RANGE" else (value, value))
        self.graph.count(len(ranges))
        return _others(ranges) if negated else _joined(ranges)

    def _category(self, name: str, negated: bool) -> _Ranges:
        r"""The characters of \d, \D, and the like."""
        letter, other = name.rsplit("_", 1)[-1][0].lower(), "_NOT_" in name
        if not self.strict:
            ranges = _category(letter, 0)
        elif negated == other:
            ranges = _category(letter, re.ASCII)
        else:  # U+FEFF is white space to ECMA-262 only
            ranges = (*_category(letter, 0), *([(0xFEFF, 0xFEFF)] if letter == "s" else []))
        return _others(ranges) if other else ranges


def _parser() -> Any:
    """Python's parser of regular expressions, which has no public name."""
    return importlib.import_module("re._parser")


def _at(item: Any) -> str:
    """The name of ^, $ and their like; nothing for other items."""
    op, value = item
    return value.name if op.name == "AT" else ""


def _parsed(schema: Any) -> Any:
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        _check_length("the schema has", len(text))
        encoded(text)
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"the schema is not JSON: {error}") from None


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise InputError(f"the schema has {number}, which no number can be; remove it")
    return value


_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$comment", "$schema", "$id", "$defs", "definitions"),
}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_TYPES: dict[str, set[str]] = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": _BOUNDS,
    "number": _BOUNDS,
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
    "boolean": set(),
    "null": set(),
}
_WHOLE = ("$ref", "enum", "const", "anyOf", "oneOf", "allOf")
"""Keywords beside which there is no other."""

_DATE = (  # RFC 3339, but for February 29
    "[1-9][0-9]{3}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    "|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
)
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
    "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_HEX, _BYTE = "[0-9a-f]", "(?:[1-9]?[0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_LABEL = "[A-Za-z0-9]+(?:-+[A-Za-z0-9]+)*"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": f"{_HEX}{{8}}-(?:{_HEX}{{4}}-){{3}}{_HEX}{{12}}",
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@(?:{_LABEL}\.)+[A-Za-z]{{2,}}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
}

_ESCAPES = {"\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t", '"': '"', "\\": "\\"}
_INTEGER = "0|-?[1-9][0-9]*"
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?"


class _Schema:
    """Makes expressions of the parts of a schema; `where` names a part in an error."""

    def __init__(self, graph: _Expressions, root: Any) -> None:
        self.graph = graph
        self.root = root
        self._patterns: dict[str, int] = {}
        self.comma = self._regex(", ?")
        self.colon = self._regex(": ?")
        self.character = self._chars(_ANY)
        self.characters = graph.repeat(self.character, 0, None)
        self._references: dict[str, int | None] = {}
        self._anything: dict[int, int] = {}

    def value(self, schema: Any, where: str) -> int:
        """The values that a schema allows."""
        if schema is True:
            return self._any(DEPTH)
        if not isinstance(schema, dict):
            self._refuse(where, f"{_short(schema)} is no schema that a value can meet")
        given = schema.keys() - _ANNOTATIONS
        if whole := [keyword for keyword in _WHOLE if keyword in schema]:
            return self._whole(whole[0], schema, where)
        if unknown := given - {"type"} - set().union(*_TYPES.values()):
            self._refuse(where, f"{min(unknown)} is not supported")
        types = self._types(schema, where)
        if beside := given - {"type"} - set().union(*(_TYPES[name] for name in types)):
            self._refuse(where, f"{min(beside)} says nothing of type {' or '.join(types)}")
        if not types:
            return self._any(DEPTH)
        return self.graph.alt([self._typed(name, schema, where) for name in types])

    def _refuse(self, where: str, what: str) -> NoReturn:
        raise InputError(f"schema at {where}: {what}; remove or change it")

    def _regex(self, pattern: str) -> int:
        if pattern not in self._patterns:
            self._patterns[pattern] = _Pattern(self.graph).read(pattern)
        return self._patterns[pattern]

    def _chars(self, ranges: _Ranges) -> int:
        """A character of a string, as JSON writes it."""
        escaped = [
            letter
            for character, letter in _ESCAPES.items()
            if any(low <= ord(character) <= high for low, high in ranges)
        ]
        plain = _others([*_others(ranges), (0, 0x1F), *_of('"\\')])
        graph = self.graph
        escapes = graph.cat(graph.text("\\"), graph.chars(_of("".join(escaped))))
        return graph.alt([graph.chars(plain), escapes])

    def _types(self, schema: dict[str, Any], where: str) -> list[str]:
        """The types that are named, or else those that the keywords are about."""
        if "type" not in schema:
            types = [name for name, keywords in _TYPES.items() if keywords & schema.keys()]
            return [name for name in types if name != "integer"]
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        for name in types:
            if not isinstance(name, str) or name not in _TYPES:
                self._refuse(where, f"type={_short(name)} is none of {', '.join(_TYPES)}")
        if not types:
            self._refuse(where, "type=[] leaves none")
        return types

    def _whole(self, keyword: str, schema: dict[str, Any], where: str) -> int:
        constant = keyword in ("enum", "const")
        if beside := schema.keys() - _ANNOTATIONS - {keyword, *(["type"] if constant else [])}:
            self._refuse(where, f"{min(beside)} is not supported beside {keyword}")
        value, where = schema[keyword], f"{where}/{keyword}"
        if keyword == "$ref":
            return self._reference(value, where)
        if keyword == "const":
            value = [value]
        if not isinstance(value, list) or not value:
            self._refuse(where, f"{_short(value)} is no list with something in it")
        if constant:
            types = self._types(schema, where)
            for one in value:
                if types and not any(_is_a(one, name) for name in types):
                    self._refuse(where, f"{_short(one)} is not of type {' or '.join(types)}")
            return self.graph.alt([self._constant(one) for one in value])
        if keyword == "allOf" and len(value) > 1:
            self._refuse(where, "allOf of more than one is not supported")
        nodes = [self.value(one, f"{where}/{i}") for i, one in enumerate(value)]
        if keyword == "oneOf":
            for i, j in combinations(range(len(value)), 2):
                if not self._exclude(value[i], value[j]):
                    self._refuse(
                        where,
                        f"neither types nor required constants tell {i} and {j} apart; anyOf is "
                        "supported",
                    )
        return self.graph.alt(nodes)

    def _reference(self, pointer: Any, where: str) -> int:
        part = self._resolved(pointer, where)
        if pointer not in self._references:
            self._references[pointer] = None
            self._references[pointer] = self.value(part, pointer)
        if (node := self._references[pointer]) is None:
            self._refuse(where, f"{pointer} is inside of itself, to any depth")
        return node

    def _resolved(self, pointer: Any, where: str) -> Any:
        """The part of the schema that a JSON pointer (RFC 6901) names."""
        if not isinstance(pointer, str) or not re.match("#(/|$)", pointer):
            self._refuse(where, f"{_short(pointer)} is no #/... of this schema")
        part = self.root
        for step in unquote(pointer).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(part, dict) and step in part:
                part = part[step]
            elif isinstance(part, list) and step.isdecimal() and int(step) < len(part):
                part = part[int(step)]
            else:
                self._refuse(where, f"{_short(pointer)} is not there")
        return part

    def _exclude(self, a: Any, b: Any) -> bool:
        """Whether it is plain that no value meets both of two schemas that `value` has read."""
        a, b = (self._referred(schema) for schema in (a, b))
        constants = [self._constants(schema) for schema in (a, b)]
        self.graph.count(10 + len(constants[0]) * len(constants[1]))
        if constants[0] and constants[1]:
            return not any(one == other for one in constants[0] for other in constants[1])
        kinds = [self._kinds(schema) for schema in (a, b)]
        if kinds[0] and kinds[1] and not kinds[0] & kinds[1]:
            return True
        if not kinds[0] == kinds[1] == {"object"}:
            return False
        shared = set(a.get("required", [])) & set(b.get("required", []))
        return any(self._exclude(a["properties"][name], b["properties"][name]) for name in shared)

    def _referred(self, schema: Any) -> Any:
        while isinstance(schema, dict) and "$ref" in schema:
            schema = self._resolved(schema["$ref"], "oneOf")
        return schema

    def _constants(self, schema: Any) -> list[Any]:
        if not isinstance(schema, dict):
            return []
        return [schema["const"]] if "const" in schema else schema.get("enum", [])

    def _kinds(self, schema: Any) -> set[str]:
        """The types of the values that a schema allows; none where that is not plain."""
        if constants := self._constants(schema):
            return {name for name in _TYPES for one in constants if _is_a(one, name)}
        # Without a type, keywords say nothing of values of other types, which are met too.
        if not isinstance(schema, dict) or "type" not in schema:
            return set()
        types = set(self._types(schema, "oneOf"))
        return types | {"integer", "number"} if types & {"integer", "number"} else types

    def _constant(self, value: Any) -> int:
        graph = self.graph
        if isinstance(value, dict):
            members = [
                graph.cat(self._text(name), self.colon, self._constant(one))
                for name, one in value.items()
            ]
            return graph.cat(graph.text("{"), *self._separated(members), graph.text("}"))
        if isinstance(value, list):
            members = [self._constant(one) for one in value]
            return graph.cat(graph.text("["), *self._separated(members), graph.text("]"))
        return self._text(value)

    def _text(self, value: Any) -> int:
        return self.graph.text(json.dumps(value, ensure_ascii=False, allow_nan=False))

    def _separated(self, members: list[int]) -> list[int]:
        return [part for member in members for part in (self.comma, member)][1:]

    def _typed(self, name: str, schema: dict[str, Any], where: str) -> int:
        match name:
            case "string":
                return self._string(schema, where)
            case "integer" | "number":
                return self._regex(self._number(name, schema, where))
            case "array":
                return self._array(schema, where)
            case "object":
                return self._object(schema, where)
        return self._regex("null" if name == "null" else "true|false")

    def _string(self, schema: dict[str, Any], where: str) -> int:
        graph = self.graph
        least, most = self._counts(schema, "Length", where)
        inside = graph.repeat(self.character, least, most)
        readings = []
        if "pattern" in schema:
            pattern = schema["pattern"]
            if not isinstance(pattern, str):
                self._refuse(where, f"pattern={_short(pattern)} is no text")
            readings.append((pattern, self.characters))
        if "format" in schema:
            name = schema["format"]
            if not isinstance(name, str) or name not in _FORMATS:
                self._refuse(where, f"format={_short(name)} is none of {', '.join(_FORMATS)}")
            readings.append((_FORMATS[name], _EMPTY))
        for pattern, around in readings:
            read = _Pattern(graph, self._chars, around, strict=True).read(pattern)
            inside = read if inside == self.characters else graph.both(inside, read)
        return graph.cat(graph.text('"'), inside, graph.text('"'))

    def _counts(self, schema: dict[str, Any], what: str, where: str) -> tuple[int, int | None]:
        """The values of min... and max..."""
        counts = []
        for name in (f"min{what}", f"max{what}"):
            count = schema.get(name)
            if isinstance(count, float) and count.is_integer():
                count = int(count)
            if name in schema and not (type(count) is int and count >= 0):
                self._refuse(where, f"{name}={_short(count)} is no count")
            counts.append(count)
        least, most = counts
        least = least or 0
        if most is not None and most < least:
            self._refuse(where, f"min{what}={least} is more than max{what}={most}")
        return least, most

    def _array(self, schema: dict[str, Any], where: str) -> int:
        graph = self.graph
        least, most = self._counts(schema, "Items", where)
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list):
            self._refuse(where, f"prefixItems={_short(prefix)} is no list")
        items = [self.value(one, f"{where}/prefixItems/{i}") for i, one in enumerate(prefix)]
        node = _EMPTY
        if schema.get("items", not prefix) is not False:
            every = self._any(DEPTH - 1)
            if "items" in schema:
                every = self.value(schema["items"], f"{where}/items")
            items = items or [every]
            fewest, largest = max(least - len(items), 0), most and max(most - len(items), 0)
            node = graph.repeat(graph.cat(self.comma, every), fewest, largest)
        elif least > len(items):
            self._refuse(where, f"minItems={least}, but only {len(items)} items are described")
        # From what follows the last item to what follows none.
        for i, item in reversed(list(enumerate(items))):
            node = graph.cat(self.comma if i else _EMPTY, item, node)
            if i >= least:
                node = graph.optional(node) if most is None or i < most else _EMPTY
        return graph.cat(graph.text("["), node, graph.text("]"))

    def _object(self, schema: dict[str, Any], where: str) -> int:
        graph = self.graph
        properties, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if not isinstance(properties, dict):
            self._refuse(where, f"properties={_short(properties)} is no table")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self._refuse(where, f"required={_short(required)} is no list of names")
        if missing := [name for name in required if name not in properties]:
            self._refuse(where, f"{missing[0]!r} is required, but not among the properties")
        if not properties:
            return self._map(others, where)
        if not isinstance(others, bool):
            self._refuse(
                where, "additionalProperties beside properties is not supported but for false"
            )
        # From what follows the last property to what follows none: after one with a comma.
        later = first = _EMPTY
        needed = set(required)
        for name, one in reversed(properties.items()):
            value = self.value(one, f"{where}/properties/{name}")
            member = graph.cat(self._text(name), self.colon, value, later)
            without = (first, later) if name not in needed else (_NOTHING, _NOTHING)
            first = graph.alt([member, without[0]])
            later = graph.alt([graph.cat(self.comma, member), without[1]])
        return graph.cat(graph.text("{"), first, graph.text("}"))

    def _map(self, values: Any, where: str) -> int:
        """An object of any properties, whose values are of a schema."""
        graph = self.graph
        members = _EMPTY
        if values is not False:
            value = self._any(DEPTH - 1)
            if values is not True:
                value = self.value(values, f"{where}/additionalProperties")
            members = self._many(graph.cat(self._string({}, where), self.colon, value))
        return graph.cat(graph.text("{"), members, graph.text("}"))

    def _many(self, node: int) -> int:
        """Any number, with commas between them."""
        graph = self.graph
        return graph.optional(graph.cat(node, graph.repeat(graph.cat(self.comma, node), 0, None)))

    def _any(self, depth: int) -> int:
        """Any value, with so many arrays and objects in each other at most."""
        if depth not in self._anything:
            graph = self.graph
            name = self._string({}, "")
            nodes = [name, self._regex(_NUMBER), self._regex("true|false|null")]
            if depth:
                value = self._any(depth - 1)
                members = self._many(graph.cat(name, self.colon, value))
                nodes.append(graph.cat(graph.text("["), self._many(value), graph.text("]")))
                nodes.append(graph.cat(graph.text("{"), members, graph.text("}")))
            self._anything[depth] = graph.alt(nodes)
        return self._anything[depth]

    def _number(self, name: str, schema: dict[str, Any], where: str) -> str:
        """The pattern of numbers within bounds."""
        bounds: dict[str, int] = {}
        for keyword in sorted(_BOUNDS & schema.keys()):
            bound = schema[keyword]
            if type(bound) not in (int, float) or not math.isfinite(bound):
                self._refuse(where, f"{keyword}={_short(bound)} is no number")
            if name == "number" and bound != int(bound):
                self._refuse(where, f"{keyword}={bound} is not whole, as it must be for numbers")
            if abs(bound) > (largest := 10**9 if name == "number" else 10**18):
                self._refuse(where, f"{keyword}={bound} is beyond {largest}")
            up = keyword in ("minimum", "exclusiveMaximum")
            bounds[keyword] = math.ceil(bound) if up else math.floor(bound)
        if not bounds:
            return _INTEGER if name == "integer" else _NUMBER
        low, above = _tightest(bounds.get("minimum"), bounds.get("exclusiveMinimum"), 1)
        high, below = _tightest(bounds.get("maximum"), bounds.get("exclusiveMaximum"), -1)
        magnitudes = _reals if name == "number" else _integers
        patterns = []
        if low is None or low < 0:
            near, without = (0, False) if high is None or high > 0 else (-high, below)
            far = None if low is None else -low
            patterns += [f"-{pattern}" for pattern in magnitudes(near, without, far, above)]
        if high is None or high >= 0:
            near, without = (0, False) if low is None or low < 0 else (low, above)
            patterns += magnitudes(near, without, high, below)
        if not patterns:
            self._refuse(where, f"nothing is within {' and '.join(bounds)}")
        return "|".join(patterns)


def _tightest(closed: int | None, open_: int | None, sign: int) -> tuple[int | None, bool]:
    """The bound that leaves less, and whether it is left out itself; sign: of the way inside."""
    given = [(sign * bound, i) for i, bound in enumerate((closed, open_)) if bound is not None]
    bound, is_open = max(given, default=(None, 0))
    return bound if bound is None else sign * bound, bool(is_open)


def _integers(low: int, above: bool, high: int | None, below: bool) -> list[str]:
    """Patterns of the integers from `low` >= 0 to `high`; `above`, `below`: without themselves."""
    return _naturals(low + above, high if high is None else high - below)


def _naturals(low: int, high: int | None) -> list[str]:
    """A pattern for each length of the integers from `low` >= 0 to `high`."""
    patterns = []
    while high is None or low <= high:
        digits = len(str(low))
        last = 10**digits - 1
        patterns.append(_as_long(str(low), str(last if high is None else min(last, high))))
        if high is None:
            return [*patterns, f"[1-9][0-9]{{{digits},}}"]
        low = last + 1
    return patterns


def _as_long(low: str, high: str) -> str:
    """The pattern of digits from `low` to `high`, both of one length."""
    if low == high:
        return low
    if low[0] == high[0]:
        return low[0] + _as_long(low[1:], high[1:])
    digits = len(low) - 1
    first, last, patterns = int(low[0]), int(high[0]), []
    if int(low[1:] or 0) > 0:
        patterns.append(low[0] + _as_long(low[1:], "9" * digits))
        first += 1
    if high[1:] != "9" * digits:
        patterns.append(high[0] + _as_long("0" * digits, high[1:]))
        last -= 1
    if first <= last:
        patterns.append(f"[{first}-{last}][0-9]{{{digits}}}")
    return f"(?:{'|'.join(patterns)})"


# Six digits of a fraction, because a double tells them from a bound of up to 10**9.
_ZEROS, _FRACTION = r"(?:\.0{1,6})?", r"(?:\.[0-9]{1,6})?"
_MORE = rf"\.(?:{'|'.join('0' * zeros + f'[1-9][0-9]{{0,{5 - zeros}}}' for zeros in range(6))})"


def _reals(low: int, above: bool, high: int | None, below: bool) -> list[str]:
    """As `_integers`, of all numbers."""
    if high is not None and low >= high:
        return [f"{low}{_ZEROS}"] if low == high and not (above or below) else []
    patterns = [f"{low}{_MORE if above else _FRACTION}"]
    between = _naturals(low + 1, None if high is None else high - 1)
    patterns += [pattern + _FRACTION for pattern in between]
    if high is not None and not below:
        patterns.append(f"{high}{_ZEROS}")
    return patterns


def _is_a(value: Any, name: str) -> bool:
    """Whether a value is of a type of JSON schema's."""
    match value:
        case None:
            return name == "null"
        case bool():
            return name == "boolean"
        case int():
            return name in ("integer", "number")
        case float():
            return name == "number" or (name == "integer" and value.is_integer())
        case str():
            return name == "string"
    return name == ("array" if isinstance(value, list) else "object")


def _guide(
    graph: _Expressions, root: int, tokenizer: Tokenizer, ends: Sequence[int] | None, limit: int
) -> Guide:
    """The tables of an expression, for the tokens that there are."""
    if not 2 <= limit <= LARGEST_LIMIT:
        raise InputError(f"limit={limit}; set it from 2 to {LARGEST_LIMIT}")
    end_ids = _end_ids(tokenizer, ends)
    next_SB, complete_S = graph.automaton(root, limit)
    tokens, functions_FS, function_of = _token_functions(tokenizer, end_ids, next_SB)

    # Keep the states from which tokens lead to a complete one, and that tokens lead to.
    S = len(next_SB)
    leads_SS = np.zeros((S, S + 1), bool)
    for next_S in functions_FS:
        leads_SS[np.arange(S), next_S] = True
    leads_SS = leads_SS[:, :S]
    alive_S = _reached(leads_SS.T, complete_S)
    if not alive_S[0]:
        raise InputError(
            "no text can be written: none matches, or the tokenizer has no tokens for those that do"
        )
    kept = np.flatnonzero(_reached(leads_SS & alive_S, np.arange(S) == 0))
    numbers = np.full(S + 1, -1, np.int32)
    numbers[kept] = np.arange(len(kept))

    columns_CS, class_of = _distinct(numbers[functions_FS[:, kept]])
    used = (columns_CS >= 0).any(1)
    _check_size(len(kept) + 1, int(used.sum()) + 2)
    classes = np.where(used, np.cumsum(used) + _END, _NEVER)
    classes_V = np.full(tokenizer.vocab_size, _NEVER, np.int32)
    classes_V[tokens] = classes[class_of[function_of]]
    classes_V[end_ids] = _END
    final = len(kept)
    next_SC = np.full((final + 1, used.sum() + 2), -1, np.int32)
    next_SC[:final, 2:] = columns_CS[used].T
    next_SC[:final, _END] = np.where(complete_S[kept], final, -1)
    next_SC[final, _END] = final
    return Guide(classes_V, next_SC)


def _end_ids(tokenizer: Tokenizer, ends: Sequence[int] | None) -> list[int]:
    ids = sorted({tokenizer.eot, tokenizer.eos} if ends is None else set(ends))
    if not ids:
        raise InputError("ends is empty; give the id of at least one end token")
    for token in ids:
        if not 0 <= token < tokenizer.vocab_size:
            raise InputError(f"ends has {token}; ids are 0 to {tokenizer.vocab_size - 1}")
    return ids


def _token_functions(
    tokenizer: Tokenizer, ends: list[int], next_SB: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids that stand for text, what they do to states, and which of them does what.

    What a token does is a row of states, one for each that it is read in, S for none. Tokens are
    read byte by byte, all at once, and those that do the same so far share the next step.
    """
    S = len(next_SB)
    step_KS, kind_B = _distinct(np.where(next_SB < 0, S, next_SB).T)
    step_KS = np.pad(step_KS, ((0, 0), (0, 1)), constant_values=S)
    tokens = _text_tokens(tokenizer, ends)
    pieces = [tokenizer.pieces[token] for token in tokens]
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    starts = np.cumsum(lengths) - lengths
    kinds = kind_B[np.frombuffer(b"".join(pieces), np.uint8)]

    functions = [np.arange(S, dtype=np.int32), np.full(S, S, np.int32)]
    numbers = {function.tobytes(): number for number, function in enumerate(functions)}
    function_of = np.zeros(len(tokens), np.int64)
    for depth in range(lengths.max(initial=0)):
        live = np.flatnonzero((lengths > depth) & (function_of != 1))
        pairs, pair_of = np.unique(
            function_of[live] * len(step_KS) + kinds[starts[live] + depth], return_inverse=True
        )
        after = np.zeros(len(pairs), np.int64)
        for i, pair in enumerate(pairs.tolist()):
            function = step_KS[pair % len(step_KS)][functions[pair // len(step_KS)]]
            after[i] = numbers.setdefault(function.tobytes(), len(functions))
            if after[i] == len(functions):
                functions.append(function)
                _check_size(S, len(functions))
        function_of[live] = after[pair_of]
    used, function_of = np.unique(function_of, return_inverse=True)
    return tokens, np.array([functions[number] for number in used]).reshape(-1, S), function_of


def _check_size(states: int, classes: int) -> None:
    if states * classes > LARGEST_TABLE:
        raise InputError(
            f"the guide has {states:,} states and {classes:,} classes of tokens or more, a table "
            f"of over {LARGEST_TABLE:,} entries; use fewer or shorter texts and names"
        )


def _text_tokens(tokenizer: Tokenizer, ends: list[int]) -> np.ndarray:
    """The ids that stand for text: neither special, nor the end, nor of no token."""
    nothing = "\ufffd".encode()
    try:
        real = tokenizer.encode("\ufffd")
    except InputError:
        real = []
    excluded = {*ends, *tokenizer.specials.values()}
    return np.array(
        [
            token
            for token, piece in enumerate(tokenizer.pieces)
            if piece and token not in excluded and (piece != nothing or token in real)
        ],
        np.int64,
    )


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows, and for each row which of them it is."""
    numbers: dict[bytes, int] = {}
    which = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], np.int64)
    return rows[np.unique(which, return_index=True)[1]], which


def _reached(leads_SS: np.ndarray, start_S: np.ndarray) -> np.ndarray:
    """The states on a way from others."""
    leads_SS, reached_S, new_S = np.ascontiguousarray(leads_SS), start_S.copy(), start_S
    while new_S.any():
        new_S = leads_SS[new_S].any(0) & ~reached_S
        reached_S |= new_S
    return reached_S


def _spells(pieces: set[bytes], text: bytes) -> bool:
    """Whether some of the pieces in a row are the text."""
    if all(text[i : i + 1] in pieces for i in range(len(text))):
        return True
    longest = max(map(len, pieces), default=0)
    ends = [True] + [False] * len(text)
    for end in range(1, len(ends)):
        starts = range(max(end - longest, 0), end)
        ends[end] = any(ends[start] and text[start:end] in pieces for start in starts)
    return ends[-1]
