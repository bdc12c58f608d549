"""Converts JSON schemas to regular expressions of the JSON that they allow."""

import json
import math
import re
from itertools import combinations
from typing import NoReturn
from urllib.parse import unquote

from jaxgpt import strict_json
from jaxgpt.errors import InputError
from jaxgpt.generation.constrained.expressions import (
    ANY,
    EMPTY,
    NOTHING,
    Expressions,
    Ranges,
    characters_of,
    check_length,
    others,
    short,
)
from jaxgpt.generation.constrained.numbers import integers, reals, tightest
from jaxgpt.generation.constrained.pattern import Pattern
from jaxgpt.strict_json import Json
from jaxgpt.tokenizer.base import encoded

DEPTH = 3
"""The deepest nesting of arrays and objects where a schema allows any value."""


def parse(schema: object) -> Json:
    """A schema, parsed if it is text. Raises InputError if it is not JSON."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        check_length("the schema has", len(text))
        encoded(text)
        return strict_json.loads(text)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"the schema is not JSON: {error}") from None


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
"""Keywords that cannot be combined with others."""

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


class Schema:
    """Converts the parts of a schema to nodes; `where` is the path of a part, for errors."""

    def __init__(self, graph: Expressions, root: Json) -> None:
        self.graph = graph
        self.root = root
        self._patterns: dict[str, int] = {}
        self.comma = self._regex(", ?")
        self.colon = self._regex(": ?")
        self.character = self._chars(ANY)
        self.characters = graph.repeat(self.character, 0, None)
        self._references: dict[str, int | None] = {}
        self._anything: dict[int, int] = {}

    def value(self, schema: Json, where: str) -> int:
        """The node of the values that a schema allows."""
        if schema is True:
            return self._any(DEPTH)
        if not isinstance(schema, dict):
            self._refuse(where, f"{short(schema)} is no schema that a value can meet")
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
            self._patterns[pattern] = Pattern(self.graph).read(pattern)
        return self._patterns[pattern]

    def _chars(self, ranges: Ranges) -> int:
        """The node of a character of a JSON string, which may be an escape."""
        escaped = [
            letter
            for character, letter in _ESCAPES.items()
            if any(low <= ord(character) <= high for low, high in ranges)
        ]
        plain = others([*others(ranges), (0, 0x1F), *characters_of('"\\')])
        graph = self.graph
        escapes = graph.cat(graph.text("\\"), graph.chars(characters_of("".join(escaped))))
        return graph.alt([graph.chars(plain), escapes])

    def _types(self, schema: dict[str, Json], where: str) -> list[str]:
        """The types in `type`, or else those to which the keywords apply."""
        if "type" not in schema:
            types = [name for name, keywords in _TYPES.items() if keywords & schema.keys()]
            return [name for name in types if name != "integer"]
        given, types = schema["type"], []
        for name in given if isinstance(given, list) else [given]:
            if not isinstance(name, str) or name not in _TYPES:
                self._refuse(where, f"type={short(name)} is none of {', '.join(_TYPES)}")
            types.append(name)
        if not types:
            self._refuse(where, "type=[] leaves none")
        return list(dict.fromkeys(types))

    def _whole(self, keyword: str, schema: dict[str, Json], where: str) -> int:
        constant = keyword in ("enum", "const")
        if beside := schema.keys() - _ANNOTATIONS - {keyword, *(["type"] if constant else [])}:
            self._refuse(where, f"{min(beside)} is not supported beside {keyword}")
        value, where = schema[keyword], f"{where}/{keyword}"
        if keyword == "$ref":
            return self._reference(value, where)
        if keyword == "const":
            value = [value]
        if not isinstance(value, list) or not value:
            self._refuse(where, f"{short(value)} is no list with something in it")
        if constant:
            types = self._types(schema, where)
            for one in value:
                if types and not any(_is_a(one, name) for name in types):
                    self._refuse(where, f"{short(one)} is not of type {' or '.join(types)}")
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

    def _reference(self, pointer: Json, where: str) -> int:
        part, name = self._resolved(pointer, where), str(pointer)
        if name not in self._references:
            self._references[name] = None
            self._references[name] = self.value(part, name)
        if (node := self._references[name]) is None:
            self._refuse(where, f"{name} is inside of itself, to any depth")
        return node

    def _resolved(self, pointer: Json, where: str) -> Json:
        """The part of the schema at a JSON pointer (RFC 6901)."""
        if not isinstance(pointer, str) or not re.match("#(/|$)", pointer):
            self._refuse(where, f"{short(pointer)} is no #/... of this schema")
        part = self.root
        for step in unquote(pointer).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(part, dict) and step in part:
                part = part[step]
            elif isinstance(part, list) and re.fullmatch("[0-9]{1,9}", step):
                if int(step) >= len(part):
                    self._refuse(where, f"{short(pointer)} is not there")
                part = part[int(step)]
            else:
                self._refuse(where, f"{short(pointer)} is not there")
        return part

    def _exclude(self, a: Json, b: Json) -> bool:
        """Whether two schemas obviously have no value in common."""
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
        left, right = self._required(a), self._required(b)
        return any(self._exclude(left[name], right[name]) for name in left.keys() & right.keys())

    def _required(self, schema: Json) -> dict[str, Json]:
        """The schemas of the properties that an object must have."""
        fields = schema if isinstance(schema, dict) else {}
        properties, required = fields.get("properties"), fields.get("required")
        if not isinstance(properties, dict) or not isinstance(required, list):
            return {}
        return {name: properties[name] for name in required if isinstance(name, str)}

    def _referred(self, schema: Json) -> Json:
        while isinstance(schema, dict) and "$ref" in schema:
            schema = self._resolved(schema["$ref"], "oneOf")
        return schema

    def _constants(self, schema: Json) -> list[Json]:
        if not isinstance(schema, dict):
            return []
        found = [schema["const"]] if "const" in schema else schema.get("enum")
        return found if isinstance(found, list) else []

    def _kinds(self, schema: Json) -> set[str]:
        """The types of the values that a schema allows; empty if that is not obvious."""
        if constants := self._constants(schema):
            return {name for name in _TYPES for one in constants if _is_a(one, name)}
        # Without a type, keywords do not constrain values of other types, which are valid then.
        if not isinstance(schema, dict) or "type" not in schema:
            return set()
        types = set(self._types(schema, "oneOf"))
        return types | {"integer", "number"} if types & {"integer", "number"} else types

    def _constant(self, value: Json) -> int:
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

    def _text(self, value: Json) -> int:
        return self.graph.text(json.dumps(value, ensure_ascii=False, allow_nan=False))

    def _separated(self, members: list[int]) -> list[int]:
        return [part for member in members for part in (self.comma, member)][1:]

    def _typed(self, name: str, schema: dict[str, Json], where: str) -> int:
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

    def _string(self, schema: dict[str, Json], where: str) -> int:
        graph = self.graph
        least, most = self._counts(schema, "Length", where)
        inside = graph.repeat(self.character, least, most)
        readings = []
        if "pattern" in schema:
            pattern = schema["pattern"]
            if not isinstance(pattern, str):
                self._refuse(where, f"pattern={short(pattern)} is no text")
            readings.append((pattern, self.characters))
        if "format" in schema:
            name = schema["format"]
            if not isinstance(name, str) or name not in _FORMATS:
                self._refuse(where, f"format={short(name)} is none of {', '.join(_FORMATS)}")
            readings.append((_FORMATS[name], EMPTY))
        for pattern, around in readings:
            read = Pattern(graph, self._chars, around, strict=True).read(pattern)
            inside = read if inside == self.characters else graph.both(inside, read)
        return graph.cat(graph.text('"'), inside, graph.text('"'))

    def _counts(self, schema: dict[str, Json], what: str, where: str) -> tuple[int, int | None]:
        """The values of the keywords min... and max..., checked."""
        counts: list[int | None] = []
        for name in (f"min{what}", f"max{what}"):
            count = schema.get(name)
            if isinstance(count, float) and count.is_integer():
                count = int(count)
            if type(count) is int and count >= 0:
                counts.append(count)
            elif name not in schema:
                counts.append(None)
            else:
                self._refuse(where, f"{name}={short(count)} is no count")
        least, most = counts
        least = least or 0
        if most is not None and most < least:
            self._refuse(where, f"min{what}={short(least)} is more than max{what}={short(most)}")
        return least, most

    def _array(self, schema: dict[str, Json], where: str) -> int:
        graph = self.graph
        least, most = self._counts(schema, "Items", where)
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list):
            self._refuse(where, f"prefixItems={short(prefix)} is no list")
        items = [self.value(one, f"{where}/prefixItems/{i}") for i, one in enumerate(prefix)]
        node = EMPTY
        if schema.get("items", not prefix) is not False:
            every = self._any(DEPTH - 1)
            if "items" in schema:
                every = self.value(schema["items"], f"{where}/items")
            items = items or [every]
            fewest, largest = max(least - len(items), 0), most and max(most - len(items), 0)
            node = graph.repeat(graph.cat(self.comma, every), fewest, largest)
        elif least > len(items):
            self._refuse(
                where, f"minItems={short(least)}, but only {len(items)} items are described"
            )
        # From what follows the last item to what follows none.
        for i, item in reversed(list(enumerate(items))):
            node = graph.cat(self.comma if i else EMPTY, item, node)
            if i >= least:
                node = graph.optional(node) if most is None or i < most else EMPTY
        return graph.cat(graph.text("["), node, graph.text("]"))

    def _object(self, schema: dict[str, Json], where: str) -> int:
        graph = self.graph
        properties, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if not isinstance(properties, dict):
            self._refuse(where, f"properties={short(properties)} is no table")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self._refuse(where, f"required={short(required)} is no list of names")
        if missing := [name for name in required if name not in properties]:
            self._refuse(where, f"{missing[0]!r} is required, but not among the properties")
        if not properties:
            return self._map(others, where)
        if not isinstance(others, bool):
            self._refuse(
                where, "additionalProperties beside properties is not supported but for false"
            )
        # From what follows the last property to what follows none: after one with a comma.
        later = first = EMPTY
        needed = set(required)
        for name, one in reversed(properties.items()):
            value = self.value(one, f"{where}/properties/{name}")
            member = graph.cat(self._text(name), self.colon, value, later)
            without = (first, later) if name not in needed else (NOTHING, NOTHING)
            first = graph.alt([member, without[0]])
            later = graph.alt([graph.cat(self.comma, member), without[1]])
        return graph.cat(graph.text("{"), first, graph.text("}"))

    def _map(self, values: Json, where: str) -> int:
        """The node of an object with any properties, whose values match a node."""
        graph = self.graph
        members = EMPTY
        if values is not False:
            value = self._any(DEPTH - 1)
            if values is not True:
                value = self.value(values, f"{where}/additionalProperties")
            members = self._many(graph.cat(self._string({}, where), self.colon, value))
        return graph.cat(graph.text("{"), members, graph.text("}"))

    def _many(self, node: int) -> int:
        """The node of any number of items, separated by commas."""
        graph = self.graph
        return graph.optional(graph.cat(node, graph.repeat(graph.cat(self.comma, node), 0, None)))

    def _any(self, depth: int) -> int:
        """The node of any value, with arrays and objects nested at most `depth` deep."""
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

    def _number(self, name: str, schema: dict[str, Json], where: str) -> str:
        """The pattern of the numbers within bounds."""
        bounds: dict[str, int] = {}
        for keyword in sorted(_BOUNDS & schema.keys()):
            bound = schema[keyword]
            if isinstance(bound, bool) or not isinstance(bound, int | float):
                self._refuse(where, f"{keyword}={short(bound)} is no number")
            # Compared first: an integer of hundreds of digits does not become a float.
            if not abs(bound) <= (largest := 10**9 if name == "number" else 10**18):
                self._refuse(where, f"{keyword}={short(bound)} is beyond {largest}")
            if name == "number" and bound != int(bound):
                self._refuse(where, f"{keyword}={bound} is not whole, as it must be for numbers")
            up = keyword in ("minimum", "exclusiveMaximum")
            bounds[keyword] = math.ceil(bound) if up else math.floor(bound)
        if not bounds:
            return _INTEGER if name == "integer" else _NUMBER
        low, above = tightest(bounds.get("minimum"), bounds.get("exclusiveMinimum"), 1)
        high, below = tightest(bounds.get("maximum"), bounds.get("exclusiveMaximum"), -1)
        magnitudes = reals if name == "number" else integers
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


def _is_a(value: Json, name: str) -> bool:
    """Whether a value has a type of JSON schema."""
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
