"""Reads the syntax of regular expressions, with Python's own parser."""

import importlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from jaxgpt.errors import InputError
from jaxgpt.generation.constrained.expressions import (
    ANY,
    EMPTY,
    Expressions,
    Ranges,
    category,
    characters_of,
    joined,
    others,
    short,
)
from jaxgpt.tokenizer.base import encoded

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

_Item = tuple[Any, Any]  # an opcode of Python's parser, and its argument


class Pattern:
    """Converts patterns to nodes of `Expressions`.

    `chars` makes the node of a set of characters. `around` is the node of what may stand before and
    after a match at an end without ^ or $. With `strict`, characters that ECMA-262 and Python treat
    differently do not match.
    """

    def __init__(
        self,
        graph: Expressions,
        chars: Callable[[Ranges], int] | None = None,
        around: int = EMPTY,
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
            raise InputError(f"{short(pattern)} is not a regular expression: {error}") from None
        flags = re.RegexFlag(parsed.state.flags) & ~(re.UNICODE | re.VERBOSE)
        if flags & ~re.DOTALL:
            self._refuse(f"flags ({flags & ~re.DOTALL!r})")
        newlines = "\n\r\u2028\u2029" if self.strict else "\n"
        self.dot = ANY if flags else others(characters_of(newlines))
        return self._row(list(parsed), True, True)

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(f"{short(self.pattern)} has {what}, which is not supported; remove it")

    def _row(self, items: list[_Item], first: bool, last: bool) -> int:
        """The node of a sequence; at its `first` and `last` end ^ and $ are allowed."""
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
        before = self.around if first and not enters else EMPTY
        after = self.around if last and not leaves else EMPTY
        return self.graph.cat(before, *nodes, after)

    def _item(self, kind: str, value: Any, first: bool, last: bool) -> int:
        match kind:
            case "LITERAL":
                return self.chars(characters_of(chr(value)))
            case "NOT_LITERAL":
                return self.chars(others(characters_of(chr(value))))
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

    def _set(self, members: list[_Item]) -> Ranges:
        """The characters of [...]."""
        negated = members[0][0].name == "NEGATE"
        ranges: list[tuple[int, int]] = []
        for op, value in members[negated:]:
            if op.name == "CATEGORY":
                ranges += self._category(value.name, negated)
            else:
                ranges.append(value if op.name == "RANGE" else (value, value))
        self.graph.count(len(ranges))
        return others(ranges) if negated else joined(ranges)

    def _category(self, name: str, negated: bool) -> Ranges:
        r"""The characters of \d, \D, and the like."""
        letter, other = name.rsplit("_", 1)[-1][0].lower(), "_NOT_" in name
        if not self.strict:
            ranges = category(letter, 0)
        elif negated == other:
            ranges = category(letter, re.ASCII)
        else:  # U+FEFF is white space to ECMA-262 only
            ranges = (*category(letter, 0), *([(0xFEFF, 0xFEFF)] if letter == "s" else []))
        return others(ranges) if other else ranges


def _parser() -> ModuleType:
    """Python's parser of regular expressions, which has no public name."""
    return importlib.import_module("re._parser")


def _at(item: _Item) -> str:
    """The name of an anchor such as ^ or $; "" for other items."""
    op, value = item
    return value.name if op.name == "AT" else ""
