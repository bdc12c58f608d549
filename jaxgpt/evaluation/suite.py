"""Tasks by name: a small suite made from Python's standard library, and published benchmarks.

The suite is made from the documents that a run on `python` with `val_fraction` of `HELD_OUT` or
more holds out for validation, so that such a run has not seen them.
"""

import ast
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxgpt.data import DataConfig, Reader, held_out_texts
from jaxgpt.data.records import open_records
from jaxgpt.data.remote import fetch
from jaxgpt.errors import InputError
from jaxgpt.evaluation.tasks import Example, Task, read_core, read_task
from jaxgpt.paths import cache_folder, expand

CORE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # of nanochat
CORE_FOLDER = "eval_bundle"
GSM8K = "hf:openai/gsm8k/main"

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


def core() -> list[Task]:
    """The tasks of DCLM's CORE benchmark (Li et al. 2024), downloaded once to the cache folder.

    Raises:
        InputError: The download fails, or the bundle is invalid.
    """
    folder = cache_folder() / "evaluation"
    if not (folder / CORE_FOLDER / "core.yaml").is_file():
        (archive,) = fetch(CORE_URL)
        with tempfile.TemporaryDirectory(dir=_made(folder)) as partial:
            try:
                with zipfile.ZipFile(archive) as bundle:
                    bundle.extractall(partial)
                (Path(partial) / CORE_FOLDER).rename(folder / CORE_FOLDER)
            except (OSError, zipfile.BadZipFile) as error:
                if not (folder / CORE_FOLDER).is_dir():  # else another process was faster
                    raise InputError(
                        f"{archive}, downloaded from {CORE_URL}, cannot be extracted: {error}"
                    ) from None
    return read_core(folder / CORE_FOLDER)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); set JAXGPT_CACHE to another folder"
        ) from None
    return folder


def gsm8k(test: str = f"{GSM8K}#test", train: str = f"{GSM8K}#train") -> list[Task]:
    """Grade school math (Cobbe et al. 2021): the number after #### of a generated solution.

    Args:
        test: The problems, records with `question` and `answer`.
        train: Problems that are shown with their solutions.

    Raises:
        InputError: The data set cannot be read.
    """

    def examples(path: str) -> tuple[Example, ...]:
        return tuple(
            {
                "query": f"Question: {record.text('question')}\nAnswer:",
                "answer": record.text("answer"),
            }
            for record in open_records(path, Reader(("question", "answer")))
        )

    return [
        Task(
            "gsm8k",
            "generate",
            examples(test),
            shots=5,
            solved_examples=examples(train),
            stop=("Question:", "\n\n"),
            extract=r"#### *(-?[\d.,]*\d)",
        )
    ]


NAMED: dict[str, Callable[[], list[Task]]] = {"python": python_suite, "core": core, "gsm8k": gsm8k}
"""The tasks that `read_tasks` knows by name."""


def read_tasks(name: str) -> list[Task]:
    """The tasks of a name in `NAMED`, a JSON Lines file, or the folder of an evaluation bundle.

    Raises:
        InputError: The tasks cannot be read.
    """
    if name in NAMED:
        return NAMED[name]()
    path = expand(name)
    if not path.exists():
        raise InputError(
            f"there is no task {name}; use one of {', '.join(NAMED)}, a JSON Lines file, or the "
            "folder of an evaluation bundle",
            field="tasks",
        )
    return read_core(path) if path.is_dir() else [read_task(path)]
