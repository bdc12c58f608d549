"""Bounds of options, declared beside the fields and checked in one place.

    steps: Annotated[int, Ge(1)] = 1000
    weights: tuple[Annotated[float, Gt(0)], ...] = ()

The bounds are those of the package annotated-types, which pydantic reads too.
"""

import dataclasses
import math
import numbers
import operator
import typing
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from annotated_types import Ge, Gt, Le, Lt

from jaxgpt.errors import InputError

__all__ = ["Ge", "Gt", "Le", "Lt", "check_bounds"]

Bound = Ge | Gt | Le | Lt
COMPARISONS: dict[type, tuple[Callable[[Any, Any], bool], str]] = {
    Ge: (operator.ge, "to {} or more"),
    Gt: (operator.gt, "above {}"),
    Le: (operator.le, "to {} at most"),
    Lt: (operator.lt, "below {}"),
}
"""How a number is compared with the bound, and the words for it."""


def check_bounds(options: Any, path: str = "") -> None:
    """Raises InputError if a number in a dataclass is outside its field's bounds, or not finite.

    Args:
        options: An instance of a dataclass. Numbers in tuples are checked too; None is valid.
        path: What error messages have before the field's name, such as "optim.".
    """
    for name, bounds in _bounds(options.__class__).items():
        value = getattr(options, name)
        for number in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(number, numbers.Real):
                continue
            is_finite = isinstance(number, numbers.Integral) or math.isfinite(number)
            if not is_finite or not all(_holds(number, bound) for bound in bounds):
                why = "" if is_finite else " is not finite"
                each = "it" if number is value else "each"
                raise InputError(
                    f"{path}{name}={value}{why}; set {each} {_range(bounds)}", field=path + name
                )


@cache
def _bounds(cls: type) -> dict[str, list[Bound]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: [*_bounds_of(hints[field.name])] for field in dataclasses.fields(cls)}


def _bounds_of(hint: object) -> Iterator[Bound]:
    """The bounds in a type such as `Annotated[int, Ge(1)] | None`."""
    yield from (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Bound))
    for inner in typing.get_args(hint):
        yield from _bounds_of(inner)


def _holds(number: numbers.Real, bound: Bound) -> bool:
    compare, _ = COMPARISONS[type(bound)]
    return compare(number, _limit(bound))


def _limit(bound: Bound) -> Any:
    (limit,) = dataclasses.astuple(bound)
    return limit


def _range(bounds: list[Bound]) -> str:
    """The bounds in words, such as "to 1 or more", "above 0" or "from 0 to 1"."""
    limits = [_limit(bound) for bound in bounds]
    kinds = [type(bound) for bound in bounds]
    if kinds in ([Ge, Le], [Ge, Lt]):
        return "from {} to {}{}".format(limits[0], "below " * (kinds[1] is Lt), limits[1])
    words = [COMPARISONS[kind][1].format(at) for kind, at in zip(kinds, limits, strict=True)]
    return ", and ".join(words) or "to a finite number"
