"""Sets of records made on the spot, so that every way of training runs without a file or network.

From the source of the running interpreter's standard library: which package a docstring is from,
docstrings to write, docstrings to prefer, expressions and their prefix form. By rule: arithmetic.
"""

import ast
import itertools
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jaxgpt.data.sources import standard_library

PACKAGES = 8  # how many packages a docstring may be of
LONGEST = 60  # characters of an expression
REQUEST = "Write the docstring of this function."

Values = dict[str, Any]


def packages() -> Iterator[Values]:
    """`text`, the first paragraph of a docstring, and `label`, its package, of the common ones."""
    counts = Counter(package for package, _, _ in _docstrings())
    labels = [package for package, _ in counts.most_common(PACKAGES)]
    for package, _, text in _docstrings():
        if package in labels:
            yield {"text": text, "label": package}


def instructions() -> Iterator[Values]:
    """`instruction`, `input`, a function's signature, and `output`, its docstring's beginning."""
    for _, signature, text in _docstrings():
        if signature:
            yield {"instruction": REQUEST, "input": signature, "output": text}


def preferences() -> Iterator[Values]:
    """`prompt`, the same request; `chosen`, the docstring; `rejected`, another function's."""
    asked = list(instructions())
    others = [one["output"] for one in asked]
    random.Random(0).shuffle(others)
    for one, other in zip(asked, others, strict=True):
        if one["output"] != other:
            yield {
                "prompt": f"{one['instruction']}\n\n{one['input']}",
                "chosen": one["output"],
                "rejected": other,
            }


def prefix() -> Iterator[Values]:
    """`python`, an expression of the library, and `prefix`, the same as `(operator operand)`."""
    seen = set()
    for _, tree in _modules():
        for node in ast.walk(tree):
            value = getattr(node, "value", None)
            if not isinstance(node, ast.Assign | ast.Return) or value is None:
                continue
            try:
                form, text = _prefix(value), ast.unparse(value)
            except KeyError:  # what has no prefix form here
                continue
            if text != form and len(text) <= LONGEST and text not in seen:
                seen.add(text)
                yield {"python": text, "prefix": form}


def arithmetic() -> Iterator[Values]:
    """`instruction` "37 + 58 =" and `output` "95": sums and differences of two-digit numbers."""
    problems = list(itertools.product(range(10, 100), "+-", range(10, 100)))
    random.Random(0).shuffle(problems)
    for a, sign, b in problems:
        yield {"instruction": f"{a} {sign} {b} =", "output": str(a + b if sign == "+" else a - b)}


MADE: dict[str, Callable[[], Iterator[Values]]] = {
    "python:packages": packages,
    "python:instructions": instructions,
    "python:preferences": preferences,
    "python:prefix": prefix,
    "arithmetic": arithmetic,
}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    """The package and the syntax tree of each file of the library; all of them are large."""
    root, files = standard_library()
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for old escapes in the library
            try:
                tree = ast.parse(Path(file).read_bytes())
            except SyntaxError:  # of what lib2to3 tests itself with
                continue
        yield Path(file).relative_to(root).parts[0].removesuffix(".py"), tree


@cache
def _docstrings() -> tuple[tuple[str, str, str], ...]:
    """Package, signature and first paragraph of each docstring, once; of a class no signature."""
    found: dict[tuple[str, str], str] = {}
    for package, tree in _modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            signature = ""
            if not isinstance(node, ast.ClassDef):
                signature = f"def {node.name}({ast.unparse(node.args)}):"
            if 20 <= len(text) <= 300 and len(signature) <= 150:
                found.setdefault((package, text), signature)
    return tuple((package, signature, text) for (package, text), signature in found.items())


# fmt: off
_OPERATORS: dict[type, str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%",
    ast.Pow: "**", ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^", ast.LShift: "<<",
    ast.RShift: ">>", ast.And: "and", ast.Or: "or", ast.Not: "not", ast.USub: "neg",
    ast.Invert: "~", ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">",
    ast.GtE: ">=", ast.Is: "is", ast.IsNot: "is-not", ast.In: "in", ast.NotIn: "not-in",
}
# fmt: on


def _prefix(node: ast.expr) -> str:
    """The prefix form of an expression; KeyError for what has none."""
    match node:
        case ast.Name():
            return node.id
        case ast.Constant():
            return ast.unparse(node)
        case ast.Attribute():
            return f"(. {_prefix(node.value)} {node.attr})"
        case ast.Subscript(slice=ast.Slice()):
            raise KeyError("slice")
        case ast.Subscript():
            return f"(at {_prefix(node.value)} {_prefix(node.slice)})"
        case ast.UnaryOp():
            return f"({_OPERATORS[type(node.op)]} {_prefix(node.operand)})"
        case ast.BinOp():
            return f"({_OPERATORS[type(node.op)]} {_prefix(node.left)} {_prefix(node.right)})"
        case ast.BoolOp():
            return f"({_OPERATORS[type(node.op)]} {' '.join(map(_prefix, node.values))})"
        case ast.Compare(ops=[op], comparators=[right]):
            return f"({_OPERATORS[type(op)]} {_prefix(node.left)} {_prefix(right)})"
        case ast.IfExp():
            return f"(if {_prefix(node.test)} {_prefix(node.body)} {_prefix(node.orelse)})"
        case ast.Tuple() | ast.List():
            kind = "tuple" if isinstance(node, ast.Tuple) else "list"
            return f"({' '.join([kind, *map(_prefix, node.elts)])})"
        case ast.Call(keywords=[]):
            return f"({' '.join(map(_prefix, [node.func, *node.args]))})"
    raise KeyError(type(node).__name__)
