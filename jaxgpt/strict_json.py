"""A strict JSON parser (RFC 8259) for untrusted text.

Python's `json.loads` also accepts NaN and Infinity, parses 1e400 as infinity, and raises
RecursionError, which is not a ValueError, for text that is nested too deeply.
"""

import json
import math
from typing import Any

Json = dict[str, "Json"] | list["Json"] | str | float | bool | None
"""A value of JSON."""

JsonObject = dict[str, Any]
"""A JSON object. The types of its values have to be checked before they are used."""

DEEPEST = 100
"""Maximum nesting depth of arrays and objects, so that recursive code can process the values."""


def loads(text: str | bytes, *, distinct: bool = False) -> Any:
    """Parses JSON text.

    Args:
        text: The text, or its bytes in UTF-8; a byte order mark is removed.
        distinct: Whether duplicate names in an object are an error; otherwise the last one is used.

    Raises:
        ValueError: The text is not UTF-8 or not JSON, a number is not finite or has more digits
            than Python converts, or arrays and objects are nested deeper than DEEPEST.
    """
    if isinstance(text, bytes):
        text = text.decode()
    text = text.removeprefix("\ufeff")
    too_deep = f"arrays and objects are nested deeper than {DEEPEST} levels"
    try:
        value = (_DISTINCT if distinct else _DECODER).decode(text)
    except RecursionError:
        raise ValueError(too_deep) from None
    if text.count("[") + text.count("{") > DEEPEST and _is_deeper(value, DEEPEST):
        raise ValueError(too_deep)
    return value


def _is_deeper(value: object, depth: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)
            if type(child) is dict or type(child) is list
        ]
    return bool(level)


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number[:40]} is not a finite number")
    return value


def _distinct(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("an object has a duplicate name")
    return table


_DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)
_DISTINCT = json.JSONDecoder(
    parse_constant=_finite, parse_float=_finite, object_pairs_hook=_distinct
)
