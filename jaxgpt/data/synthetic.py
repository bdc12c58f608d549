"""Synthetic datasets, with which every training objective runs without files or network access.

Four are made from the source code of Python's standard library: classifying docstrings by package,
writing docstrings, preferring the right docstring, and translating expressions to prefix notation.
The others are arithmetic with two-digit numbers, and word problems with worked solutions.
"""

import ast
import itertools
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from jaxgpt.data.sources import standard_library

PACKAGES = 8  # number of classes of `packages`
LONGEST = 60  # maximum characters of an expression of `prefix`
REQUEST = "Write the docstring of this function."

Values = dict[str, object]


def packages() -> Iterator[Values]:
    """Classification: `text` is a docstring's first paragraph, `label` one of 8 packages."""
    counts = Counter(package for package, _, _ in _docstrings())
    labels = [package for package, _ in counts.most_common(PACKAGES)]
    for package, _, text in _docstrings():
        if package in labels:
            yield {"text": text, "label": package}


def instructions() -> Iterator[Values]:
    """Instructions: `input` is a function's signature, `output` its docstring's first paragraph."""
    for _, signature, text in _docstrings():
        if signature:
            yield {"instruction": REQUEST, "input": signature, "output": text}


def preferences() -> Iterator[Values]:
    """Preferences: `chosen` is the docstring of the function in `prompt`, `rejected` another's."""
    requests = list(instructions())
    others = [request["output"] for request in requests]
    random.Random(0).shuffle(others)
    for request, other in zip(requests, others, strict=True):
        if request["output"] != other:
            yield {
                "prompt": f"{request['instruction']}\n\n{request['input']}",
                "chosen": request["output"],
                "rejected": other,
            }


def prefix() -> Iterator[Values]:
    """Translation: `python` is an expression of the library, `prefix` its prefix notation."""
    seen = set()
    for _, tree in _modules():
        for node in ast.walk(tree):
            value = getattr(node, "value", None)
            if not isinstance(node, ast.Assign | ast.Return) or value is None:
                continue
            try:
                form, text = _prefix(value), ast.unparse(value)
            except KeyError:  # an expression that `_prefix` does not support
                continue
            if text != form and len(text) <= LONGEST and text not in seen:
                seen.add(text)
                yield {"python": text, "prefix": form}


def arithmetic() -> Iterator[Values]:
    """Arithmetic: `instruction` is "37 + 58 =", `output` "95"; all two-digit sums, differences."""
    problems = list(itertools.product(range(10, 100), "+-", range(10, 100)))
    random.Random(0).shuffle(problems)
    for a, sign, b in problems:
        yield {"instruction": f"{a} {sign} {b} =", "output": str(a + b if sign == "+" else a - b)}


WORD_PROBLEMS = 20_000  # number of records of `word_problems`
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kim", "Leo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "shells", "stamps")


def word_problems() -> Iterator[Values]:
    """Word problems: `question`, and `answer` with the solution in GSM8K's format, "... #### 42".

    A problem has one to three steps, each a sentence of the question and a line of the solution.
    """
    rng = random.Random(0)
    seen: set[str] = set()
    while len(seen) < WORD_PROBLEMS:
        question, answer = _word_problem(rng)
        if question not in seen:
            seen.add(question)
            yield {"question": question, "answer": answer}


def _word_problem(rng: random.Random) -> tuple[str, str]:
    """Returns a problem and its solution; all numbers in it are positive and whole."""
    (name, other), thing, value = rng.sample(NAMES, 2), rng.choice(THINGS), rng.randint(2, 12)
    story, solution = [f"{name} has {value} {thing}."], []
    for _ in range(rng.randint(1, 3)):
        some, few = rng.randint(2, 9), rng.randint(2, 3)
        steps = [
            (f"{value} + {some}", value + some, f"{name} finds {some} more."),
            (f"{value} + {some}", value + some, f"{other} gives {name} {some} more."),
        ]
        if value > some:
            steps += [
                (f"{value} - {some}", value - some, f"{name} loses {some} of them."),
                (f"{value} - {some}", value - some, f"{name} gives {some} of them to {other}."),
            ]
        if value <= 12:
            steps.append((f"{value} * {few}", value * few, f"Then {name} has {few} times as many."))
        if value % few == 0:
            sentence = f"{name} puts them into {few} equal boxes and keeps one box."
            steps.append((f"{value} / {few}", value // few, sentence))
        term, value, sentence = rng.choice(steps)
        story.append(sentence)
        solution.append(f"{term} = {value}")
    story.append(f"How many {thing} does {name} have now?")
    return " ".join(story), "\n".join([*solution, f"#### {value}"])


SYNTHETIC: dict[str, Callable[[], Iterator[Values]]] = {
    "python:packages": packages,
    "python:instructions": instructions,
    "python:preferences": preferences,
    "python:prefix": prefix,
    "arithmetic": arithmetic,
    "word_problems": word_problems,
}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    """Yields the package and syntax tree of each library file, lazily, because trees are large."""
    root, files = standard_library()
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deprecated escapes in the library
            try:
                tree = ast.parse(Path(file).read_bytes())
            except SyntaxError:  # lib2to3 has invalid files as test data
                continue
        yield Path(file).relative_to(root).parts[0].removesuffix(".py"), tree


@cache
def _docstrings() -> tuple[tuple[str, str, str], ...]:
    """Distinct docstrings: package, signature (empty for a class) and first paragraph of each."""
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
    """Returns the prefix notation of an expression; raises KeyError if it is not supported."""
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
