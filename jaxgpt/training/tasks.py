"""Measures a run on tasks after its last step, and keeps the results in its `evaluation.json`.

That file is a list, with an entry for each task as `python -m jaxgpt eval --json` writes them.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from jaxgpt.chat import choose
from jaxgpt.errors import InputError
from jaxgpt.evaluation import suite
from jaxgpt.evaluation.config import EVALUATION, EvaluationConfig
from jaxgpt.evaluation.measure import Result
from jaxgpt.evaluation.tasks import Task
from jaxgpt.tokenizer import Tokenizer


@cache
def read_tasks(cfg: EvaluationConfig) -> tuple[Task, ...]:
    """The tasks of a config; they are read once in a process.

    Raises:
        InputError: A task cannot be read, or is invalid with so many shots.
    """
    tasks = [task for name in cfg.tasks for task in suite.read_tasks(name)]
    if cfg.shots >= 0:
        tasks = [replace(task, shots=cfg.shots if task.type != "text" else 0) for task in tasks]
    for task in tasks:
        task.check()
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"evaluation.tasks={' '.join(cfg.tasks)} has two tasks named {twice[0]}; remove one",
            field="evaluation.tasks",
        )
    return tuple(tasks)


def check_chat(cfg: EvaluationConfig, tokenizer: Tokenizer) -> None:
    """Raises InputError if tasks are to be conversations and the tokenizer has no chat format."""
    if cfg.chat and cfg.tasks:
        try:
            choose(tokenizer)
        except InputError as error:
            raise InputError(f"evaluation.chat=True: {error}", field="evaluation.chat") from None


def is_measured(folder: Path, step: int, cfg: EvaluationConfig) -> bool:
    """Whether `evaluation.json` in a run's folder has a step's results on all tasks of a config."""
    wanted = [(task.name, task.shots, cfg.limit, step, cfg.chat) for task in read_tasks(cfg)]
    if not wanted:
        return True
    keys = ("task", "shots", "limit", "step")
    try:
        found = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        # Results of earlier versions do not say whether they are those of a conversation.
        return [(*(one[key] for key in keys), one.get("chat", False)) for one in found] == wanted
    except (OSError, ValueError, KeyError, TypeError):
        return False


def save_results(folder: Path, step: int, cfg: EvaluationConfig, results: Sequence[Result]) -> None:
    """Writes what was measured at a step to `evaluation.json` in a run's folder."""
    content = [
        {**result.as_json(), "limit": cfg.limit, "chat": cfg.chat, "step": step}
        for result in results
    ]
    new = folder / f"{EVALUATION}.new"
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(new, folder / EVALUATION)


def as_metrics(results: Sequence[Result]) -> dict[str, float]:
    """The results as numbers by name for `metrics.jsonl`, such as `eval_TASK/accuracy`."""
    found = {}
    for result in results:
        for name, metric in result.metrics.items():
            found[f"eval_{result.task.name}/{name}"] = metric.value
            found[f"eval_{result.task.name}/{name}_error"] = metric.error
    return found
