"""A small suite of tasks made from Python's standard library, which needs no download.

The tasks are made from the documents that a run on `python` with `val_fraction` of `HELD_OUT` or
more holds out for validation, so that such a run has not seen them.
"""

import ast
import random
from collections.abc import Iterator, Sequence

from jaxgpt.data import DataConfig, held_out_texts
from jaxgpt.evaluation.tasks import Example, Task, read_core, read_task
from jaxgpt.paths import expand

HELD_OUT = 0.05
SEED = 0
CHOICES = 4
LINES = 8  # of code before a line that is to be told
MOST = 200  # examples of each task


def python_suite(most: int = MOST) -> list[Task]:
    """The tasks: the next line of code, the name for a docstring, a repeated name, and the text.

    Args:
        most: The most examples of each task.
    """
    cfg = DataConfig(paths=("python",), val_fraction=HELD_OUT)
    documents = [text for text in held_out_texts(cfg) if len(text) > 2000]
    return [
        Task(
            "python_next_line",
            "multiple_choice",
            _some(_next_lines(documents), most),
            delimiter="\n",
            separator="\n\n",
            baseline=1 / CHOICES,
        ),
        Task(
            "python_name",
            "multiple_choice",
            _some(_names(documents), most),
            shots=2,
            delimiter="\n",
            baseline=1 / CHOICES,
        ),
        Task("python_repeated_name", "cloze", _some(_repeated(documents), most), delimiter=""),
        Task("python_text", "text", _some(({"text": text} for text in documents), most // 10)),
    ]


def _some(examples: Iterator[Example], most: int) -> tuple[Example, ...]:
    """At most so many of the examples, drawn without replacement, always the same."""
    found = list(examples)
    return tuple(random.Random(SEED).sample(found, min(most, len(found))))


def _with_gold(right: str, others: Sequence[str], draw: random.Random) -> dict[str, object]:
    choices = [right, *others]
    draw.shuffle(choices)
    return {"choices": choices, "gold": choices.index(right)}


def _next_lines(documents: Sequence[str]) -> Iterator[Example]:
    """Lines of code, and which of four lines of the same file comes next."""
    draw = random.Random(SEED)
    for text in documents:
        lines = [line for line in text.split("\n") if line.strip()]
        different = sorted({line for line in lines if len(line.strip()) > 12})
        for at in range(LINES, len(lines), 4 * LINES):
            right = lines[at]
            others = [line for line in different if line != right]
            if len(right.strip()) > 12 and len(others) >= CHOICES - 1:
                query = "\n".join(lines[at - LINES : at])
                yield {"query": query, **_with_gold(right, draw.sample(others, CHOICES - 1), draw)}


def _names(documents: Sequence[str]) -> Iterator[Example]:
    """First sentences of docstrings, and which of four functions of the same file they describe."""
    draw = random.Random(SEED)
    for text in documents:
        try:
            nodes = [
                node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
            ]
        except (SyntaxError, ValueError):  # a test file for the parser
            continue
        names = sorted({node.name for node in nodes})
        for node in nodes:
            sentence = (ast.get_docstring(node) or "").split("\n")[0]
            others = [name for name in names if name != node.name]
            if len(sentence) > 20 and len(others) >= CHOICES - 1:
                named = [f"def {name}(" for name in draw.sample(others, CHOICES - 1)]
                gold = _with_gold(f"def {node.name}(", named, draw)
                yield {"query": f"# {sentence}", **gold}


def _repeated(documents: Sequence[str]) -> Iterator[Example]:
    """Code up to a name that it has used before, and that name."""
    for text in documents:
        lines = text.split("\n")
        for at in range(2 * LINES, len(lines)):
            head, dot, tail = lines[at].partition("self.")
            name = tail[: next((i for i, c in enumerate(tail) if not (c.isalnum() or c == "_")), 0)]
            before = "\n".join(lines[at - 2 * LINES : at])
            if dot and len(name) > 3 and f"self.{name}" in before:
                yield {"context": f"{before}\n{head}self.", "continuation": name}


def read_tasks(name: str) -> list[Task]:
    """The tasks of a JSON Lines file, of the folder of an evaluation bundle, or of "python"."""
    if name == "python":
        return python_suite()
    return read_core(name) if (expand(name) / "core.yaml").is_file() else [read_task(name)]
