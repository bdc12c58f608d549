"""Evaluation tasks as data: a JSON Lines file whose first line has the settings.

    {"task": "capitals", "type": "multiple_choice", "shots": 2}
    {"query": "The capital of France is", "choices": ["Paris", "Rome"], "gold": 0}

Types, the fields of their examples, and what is measured:

- multiple_choice (query, choices, gold): whether the right choice is the most likely.
- schema (context_options, continuation, gold): whether the right context makes the text likeliest.
- cloze (context, continuation): whether greedy decoding writes the continuation.
- generate (query, answer): whether the generated answer is the right one.
- text (text): loss, perplexity and bits per byte.

`gold` is a number, or the right choice itself. The first four are the types of DCLM's CORE
benchmark (Li et al. 2024), with `cloze` for its `language_modeling`; a folder of its evaluation
bundle is read as it is.
"""

import csv
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from jaxgpt import strict_json
from jaxgpt.bounds import Ge, Lt, check_bounds
from jaxgpt.errors import InputError
from jaxgpt.paths import expand

Type = Literal["multiple_choice", "schema", "cloze", "generate", "text"]
FIELDS: dict[str, tuple[str, ...]] = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "cloze": ("context", "continuation"),
    "generate": ("query", "answer"),
    "text": ("text",),
}
"""The fields of an example of each type."""
METRICS: dict[str, tuple[str, ...]] = {
    "multiple_choice": (
        *("accuracy", "accuracy_per_byte", "accuracy_per_token", "accuracy_unconditional"),
    ),
    "schema": ("accuracy",),
    "cloze": ("accuracy", "perplexity"),
    "generate": ("exact_match",),
    "text": ("bits_per_byte", "loss", "perplexity"),
}
"""What is measured for each type, the main metric first."""
CORE_TYPES = {"language_modeling": "cloze"}

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A set of examples, how they become prompts, and how answers are judged."""

    name: str
    """The name of the task, in tables and metrics."""
    type: Type
    """What an example is, see the module."""
    examples: tuple[Example, ...] = field(repr=False)
    """The examples, in the order of the file."""
    shots: Annotated[int, Ge(0)] = 0
    """The number of solved examples in each prompt (few-shot); 0: zero-shot."""
    fixed: bool = False
    """Whether all prompts have the same solved examples, the first ones, which are then not
    measured. Otherwise they are drawn at random for each example."""
    solved_examples: tuple[Example, ...] = field(default=(), repr=False)
    """Examples that are only shown solved, such as those of a training set; empty: the solved ones
    are other examples of the task."""
    description: str = ""
    """Text at the beginning of each prompt."""
    delimiter: str = " "
    """Text between a query and its answer, unless they are messages of a conversation."""
    separator: str = "\n\n"
    """Text between the solved examples, unless they are messages of a conversation."""
    choices: tuple[str, ...] = ()
    """multiple_choice: the choices of examples that have none of their own, such as labels."""
    stop: tuple[str, ...] = ("\n",)
    """generate: strings before which an answer ends, unless it is a message of a conversation."""
    tokens: Annotated[int, Ge(1)] = 256
    """generate: the most tokens of an answer."""
    extract: str = ""
    """generate: a regular expression; its last match in the generated text and in `answer`, or the
    first group of the match, is compared. Empty: the whole texts without white space around."""
    metric: str = ""
    """The metric of the task that stands first in tables; empty: the first in `METRICS`."""
    baseline: Annotated[float, Ge(0), Lt(1)] = 0.0
    """The accuracy of random choices. The centered score is 0 there, and 1 if all is right."""

    def check(self) -> None:
        """Raises InputError if a setting or an example is invalid."""
        check_bounds(self, f"{self.name}: ")
        if self.type not in get_args(Type):
            kinds = ", ".join(get_args(Type))
            raise InputError(f"task {self.name}: type={self.type!r}; set it to one of {kinds}")
        if self.metric and self.metric not in METRICS[self.type]:
            raise InputError(
                f"task {self.name}: metric={self.metric!r}; set it to one of "
                f"{', '.join(METRICS[self.type])}"
            )
        try:
            re.compile(self.extract)
        except re.error as error:
            raise InputError(
                f"task {self.name}: extract={self.extract!r} is no regular expression: {error}"
            ) from None
        if not self.examples:
            raise InputError(f"task {self.name} has no examples; write one on each line")
        to_show = len(self.solved_examples or self.examples[1:])  # all but the measured one
        if to_show < self.shots:
            raise InputError(
                f"task {self.name} has {to_show} examples to show solved, too few for "
                f"{self.shots} shots; set fewer shots"
            )
        if self.type == "text" and self.shots:
            raise InputError(f"task {self.name}: a text has no shots; set shots to 0")

    @property
    def measured(self) -> range:
        """The numbers of the examples that are measured."""
        first = self.shots if self.fixed and not self.solved_examples else 0
        return range(first, len(self.examples))

    def shown(self, number: int, seed: int = 0) -> list[tuple[str, str]]:
        """The solved examples before an example, as pairs of a query and its answer.

        Args:
            number: The number of the example, which is not one of the solved ones.
            seed: The seed with which solved examples are drawn.
        """
        others = self.solved_examples or self.examples
        numbers: Sequence[int] = range(self.shots)
        if not self.fixed:
            draw = random.Random(f"{seed} {number}")
            count = len(others) - (not self.solved_examples)
            numbers = draw.sample(range(count), self.shots)
            if not self.solved_examples:  # all but the example itself
                numbers = [one + (one >= number) for one in numbers]
        return [self.pair(others[one]) for one in numbers]

    def prompt(self, number: int, seed: int = 0) -> str:
        """The beginning of an example's prompt: the description and the solved examples, as text.

        Args:
            number: As for `shown`.
            seed: As for `shown`.
        """
        shown = self.shown(number, seed)
        solved = [f"{query}{self.delimiter}{answer}{self.separator}" for query, answer in shown]
        return self.description + "".join(solved)

    def pair(self, example: Example) -> tuple[str, str]:
        """The query of an example and its right answer."""
        match self.type:
            case "multiple_choice":
                return str(example["query"]), str(example["choices"][example["gold"]])
            case "schema":
                return str(example["context_options"][example["gold"]]), example["continuation"]
            case "cloze":
                return example["context"].rstrip(), example["continuation"]
            case _:
                return str(example["query"]), str(example["answer"])

    def extracted(self, text: str) -> str:
        """The part of a generated text, or of a right answer, that is compared."""
        if not self.extract:
            return text.strip()
        found = list(re.finditer(self.extract, text))
        if not found:
            return ""
        last = found[-1]
        return (last[1] if last.re.groups else last[0]).strip().replace(",", "")


def read_task(path: str | Path, name: str = "") -> Task:
    """Reads a task from a JSON Lines file.

    Args:
        path: The file. Its first line has the settings, the fields of `Task` (with `task` for the
            name, and for `solved_examples` a file beside it with an example on each line); the
            others have one example each.
        name: The task's name if the settings have none; empty: the name of the file.

    Raises:
        InputError: The file cannot be read, or a setting or an example is invalid; the message
            names the line.
    """
    path = expand(path)
    lines = _json_lines(path)
    settings = dict(lines[0][1]) if lines else {}
    if "type" not in settings:
        raise InputError(
            f"{path}: line 1 has no settings of a task; begin the file with a line such as "
            '{"task": "NAME", "type": "multiple_choice"}'
        )
    settings = {"name": settings.pop("task", name or path.stem), **settings}
    known = [f.name for f in fields(Task) if f.name != "examples"]
    shown = settings.pop("solved_examples", "")
    if not isinstance(shown, str):
        raise InputError(f"{path}: line 1: solved_examples={shown!r:.80}; set it to a file's name")
    for key in settings:
        if key not in known:
            raise InputError(f"{path}: line 1: {key} is not a setting; use {', '.join(known)}")
    if isinstance(settings.get("stop"), str):
        settings["stop"] = [settings["stop"]]
    for key in ("stop", "choices"):
        if key in settings:
            settings[key] = tuple(settings[key])
    task = Task(**settings, examples=())
    if task.type not in FIELDS:
        task.check()
    if shown:
        file = path.parent / expand(shown)
        task = replace(task, solved_examples=_examples(task, file, _json_lines(file)))
    return _with_examples(task, path, lines[1:])


def read_core(folder: str | Path) -> list[Task]:
    """Reads the tasks of a DCLM evaluation bundle, such as CORE, from its folder.

    The folder has core.yaml with the list `icl_tasks`, their data in eval_data, and in
    eval_meta_data.csv the accuracy of random choices.

    Raises:
        InputError: A file is missing or invalid.
    """
    import yaml  # of huggingface_hub's dependencies

    folder = expand(folder)
    baselines = {}
    meta = folder / "eval_meta_data.csv"
    if meta.is_file():
        with meta.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                baselines[row.get("Eval Task", "")] = float(row.get("Random baseline") or 0) / 100
    try:
        listed = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'core.yaml'} has no list icl_tasks: {error}") from None
    tasks = []
    for entry in listed:
        kind = str(entry["icl_task_type"])
        path = folder / "eval_data" / str(entry["dataset_uri"])
        task = Task(
            name=str(entry["label"]),
            type=CORE_TYPES.get(kind, kind),  # type: ignore[arg-type]  # checked by `check`
            examples=(),
            shots=int(entry.get("num_fewshot", [0])[0]),
            delimiter=str(entry.get("continuation_delimiter", " ")),
            metric="accuracy_per_token" if kind == "multiple_choice" else "",
            baseline=baselines.get(str(entry["label"]), 0.0),
        )
        if task.type not in FIELDS:
            task.check()
        tasks.append(_with_examples(task, path, _json_lines(path)))
    return tasks


def _with_examples(task: Task, path: Path, lines: Sequence[tuple[int, Example]]) -> Task:
    task = replace(task, examples=_examples(task, path, lines))
    task.check()
    return task


def _examples(task: Task, path: Path, lines: Sequence[tuple[int, Example]]) -> tuple[Example, ...]:
    return tuple(_checked(task, f"{path}: line {number}", line) for number, line in lines)


def _checked(task: Task, where: str, values: Example) -> Example:
    """An example of the task with its gold as a number; InputError if it is invalid."""
    example = dict(values)
    if task.type == "multiple_choice" and "choices" not in example and task.choices:
        example["choices"] = list(task.choices)
    needed = FIELDS[task.type]
    if missing := [name for name in needed if name not in example]:
        raise InputError(
            f"{where}: {missing[0]} is missing; an example of type {task.type} has "
            f"{', '.join(needed)}"
        )
    for name in needed:
        value = example[name]
        if name in ("choices", "context_options"):
            if not isinstance(value, list) or len(value) < 2 or not all(map(_is_text, value)):
                raise InputError(f"{where}: {name}={value!r:.80}; set it to two texts or more")
        elif name != "gold" and not (isinstance(value, str) and value):
            raise InputError(f"{where}: {name}={value!r:.80}; set it to a text")
    if "gold" in needed:
        options = example["choices" if task.type == "multiple_choice" else "context_options"]
        gold = example["gold"]
        if isinstance(gold, str) and gold in options:
            example["gold"] = options.index(gold)
        elif type(gold) is not int or not 0 <= gold < len(options):
            raise InputError(
                f"{where}: gold={gold!r:.80}; set it to the number of the right one, from 0 to "
                f"{len(options) - 1}, or to its text"
            )
    return example


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _json_lines(path: Path) -> list[tuple[int, Example]]:
    """The objects of a JSON Lines file and their line numbers, from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from None
    found: list[tuple[int, Example]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = strict_json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}: line {number} is no JSON object; write one on each line")
        found.append((number, value))
    return found
