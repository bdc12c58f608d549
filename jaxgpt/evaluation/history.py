"""What a run's folder says of the run, read without loading arrays or touching a device.

Nothing is required: a run may still be training, have no checkpoint, come from an earlier version,
or have damaged files. What is missing or cannot be read is a line of `RunHistory.notes`.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxgpt import config
from jaxgpt.config import Config
from jaxgpt.errors import InputError
from jaxgpt.evaluation.config import EVALUATION
from jaxgpt.strict_json import JsonObject
from jaxgpt.training import checkpoint
from jaxgpt.training.lock import find_holder
from jaxgpt.training.metrics import SAMPLES, parse_metrics

MARKS = ("config.json", "metrics.jsonl", "checkpoints")
"""What a run's folder has; one of them is enough."""


@dataclass
class Session:
    """One process that trained the run: from its start to its end, or to when it was killed."""

    facts: JsonObject
    """What the process recorded of itself: devices, data and model."""
    began: float
    """The Unix time of its first record."""
    ended: float
    """The Unix time of its last record."""
    goodput: dict[str, float] = field(default_factory=dict)
    """Seconds by what they were spent on; empty if the process was killed."""

    @property
    def seconds(self) -> float:
        """The wall time; of a process that was killed, as far as its records go."""
        return sum(self.goodput.values()) or self.ended - self.began

    @property
    def devices(self) -> int | None:
        """The number of devices, if it was recorded."""
        count = self.facts.get("devices")
        return count if isinstance(count, int) else None


@dataclass(frozen=True)
class RunHistory:
    """What the folder of a run has."""

    folder: Path
    name: str
    """The name of the run."""
    values: JsonObject
    """The content of config.json."""
    config: Config | None
    """The config; None if this version of the package cannot read it."""
    records: Sequence[JsonObject]
    """The records of metrics.jsonl."""
    abandoned: Sequence[JsonObject]
    """Records of steps that were trained again, after a crash or because the run went back."""
    metadata: JsonObject
    """The metadata of the newest checkpoint that can be read; empty if there is none."""
    evaluations: Sequence[JsonObject]
    """Results of tasks, as `measure.Result.as_json` writes them."""
    samples: dict[int, str]
    """Samples of the model by step."""
    state: str
    """"training", "finished" or "stopped"."""
    notes: Sequence[str]
    """What is missing or cannot be read."""

    @cached_property
    def options(self) -> dict[str, Any]:
        """All options of config.json by their whole name, such as `train.steps`."""
        return config.flatten(self.values)

    @cached_property
    def points(self) -> dict[str, dict[float, float]]:
        """The value at each step of every metric, without those that are not finite numbers."""
        found: dict[str, dict[float, float]] = {}
        for record in self.records:
            step = _number(record.get("step"))
            for name, value in record.items():
                number = _number(value)
                if step is not None and number is not None:
                    found.setdefault(name, {})[step] = number
        return found

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """The steps and the values of a metric."""
        points = self.points.get(name, {})
        steps = sorted(points)
        return steps, [points[step] for step in steps]

    def last(self, name: str) -> float | None:
        """The last value of a metric; None if there is none."""
        _, values = self.curve(name)
        return values[-1] if values else None

    def best(self, name: str) -> tuple[int, float] | None:
        """The step with the lowest value of a metric, and the value."""
        steps, values = self.curve(name)
        if not values:
            return None
        value, step = min(zip(values, steps, strict=True))
        return int(step), value

    def metrics(self, prefix: str) -> list[str]:
        """The names of all metrics that begin with `prefix`, in the order of the file."""
        return [name for name in self.points if name.startswith(prefix)]

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl, or that of the newest checkpoint."""
        steps = self.points.get("step", {})
        return int(max(steps, default=self.metadata.get("metrics", {}).get("step", 0)))

    @property
    def steps(self) -> int | None:
        """The number of steps in the config."""
        return _integer(self.options.get("train.steps"))

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens in a batch, padding included."""
        context = self.options.get("train.context") or self.options.get("model.T")
        batch, length = _integer(self.options.get("train.batch")), _integer(context)
        return batch * length if batch and length else None

    @cached_property
    def sessions(self) -> list[Session]:
        """The processes that trained the run, in the order of time."""
        timed = [
            (time, record)
            for record in (*self.abandoned, *self.records)
            if (time := _number(record.get("time"))) is not None
        ]
        found: list[Session] = []
        for time, record in sorted(timed, key=lambda one: one[0]):
            facts = record.get("session")
            over = bool(found and found[-1].goodput and "finished" not in record)
            if isinstance(facts, dict) or not found or (over and not found[-1].facts):
                found.append(Session(facts if isinstance(facts, dict) else {}, time, time))
            found[-1].ended = time
            goodput = record.get("goodput")
            if isinstance(goodput, dict):
                known = {name: _number(seconds) for name, seconds in goodput.items()}
                found[-1].goodput = {n: s for n, s in known.items() if s is not None}
        return found

    @property
    def goodput(self) -> dict[str, float]:
        """Seconds by what they were spent on, over all sessions that ended by themselves."""
        total: Counter[str] = Counter()
        for session in self.sessions:
            total.update(session.goodput)
        return dict(total)

    @property
    def seconds(self) -> float:
        """The wall time of all sessions."""
        return sum(session.seconds for session in self.sessions)

    @property
    def device_hours(self) -> float | None:
        """Hours times devices; None if a session did not record its devices."""
        hours = [None if s.devices is None else s.devices * s.seconds / 3600 for s in self.sessions]
        known = [each for each in hours if each is not None]
        return sum(known) if known and len(known) == len(hours) else None

    @property
    def facts(self) -> JsonObject:
        """What the newest session recorded of itself."""
        return next((s.facts for s in reversed(self.sessions) if s.facts), {})

    @property
    def parameters(self) -> dict[str, str]:
        """The dtype and the shape of every parameter, such as "float32[4096,128]", by path."""
        leaves = self.metadata.get("leaves")
        found = leaves.get("params") if isinstance(leaves, dict) else None
        return found if isinstance(found, dict) else {}


def read_history(path: str | Path) -> RunHistory:
    """Reads what the folder of a run has.

    Args:
        path: The run's folder.

    Raises:
        InputError: It is not the folder of a run.
    """
    folder = Path(path).expanduser()
    if not any((folder / mark).exists() for mark in MARKS):
        raise InputError(f"{path} is not a run's folder: it has none of {', '.join(MARKS)}")
    folder = folder.resolve()
    notes: list[str] = []
    values = _read_json(folder / "config.json", notes)
    if not isinstance(values, dict):
        notes += ["config.json is not a JSON object"] if values is not None else []
        values = {}
    cfg: Config | None = None
    try:
        cfg = config.from_dict(Config, values) if values else None
    except (InputError, TypeError, ValueError) as error:
        notes.append(f"config.json is of another version: {error}")
    records = _read_records(folder / "metrics.jsonl", notes)
    samples = _read_records(folder / SAMPLES, notes, required=False)
    evaluations = _read_json(folder / EVALUATION, notes, required=False)
    return RunHistory(
        folder,
        folder.name,
        values,
        cfg,
        records,
        _read_records(folder / "metrics.abandoned.jsonl", notes, required=False),
        _read_metadata(folder, notes),
        _results(evaluations, notes),
        {
            step: text
            for record in samples
            if (step := _integer(record.get("step"))) is not None
            and isinstance(text := record.get("text"), str)
        },
        _state(folder, records, values),
        notes,
    )


def _read_json(path: Path, notes: list[str], required: bool = True) -> Any:
    """The content of a JSON file; None with a note if it cannot be read."""
    if not path.exists():
        if required:
            notes.append(f"there is no {path.name}")
        return None
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return None


def _read_records(path: Path, notes: list[str], required: bool = True) -> list[JsonObject]:
    if not path.exists():
        if required:
            notes.append(f"there is no {path.name}")
        return []
    try:
        records, messages = parse_metrics(path)
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    notes += [f"{path.name}: {message}" for message in messages]
    return records


def _read_metadata(folder: Path, notes: list[str]) -> JsonObject:
    if not checkpoint.step_folders(folder / "checkpoints"):
        notes.append("there is no checkpoint, so parameters, versions and lineage are not known")
        return {}
    try:
        return checkpoint.read_metadata(folder)
    except (InputError, OSError, ValueError, KeyError) as error:
        notes.append(f"no checkpoint can be read: {error}")
        return {}


def _results(evaluations: Any, notes: list[str]) -> list[JsonObject]:
    """The results in evaluation.json that have a task and metrics."""
    if evaluations is None:
        return []
    listed = evaluations if isinstance(evaluations, list) else [evaluations]
    good = [
        one
        for one in listed
        if isinstance(one, dict) and "task" in one and isinstance(one.get("metrics"), dict)
    ]
    if len(good) < len(listed):
        notes.append(f"{EVALUATION}: {len(listed) - len(good)} entries are not results of a task")
    return good


def _state(folder: Path, records: Sequence[JsonObject], values: JsonObject) -> str:
    steps = _integer(config.flatten(values).get("train.steps")) or math.inf
    if any((_number(record.get("step")) or 0) >= steps for record in records):
        return "finished"
    return "training" if find_holder(folder) else "stopped"


def _number(value: Any) -> float | None:
    """The value if it is a finite number, and not so large that it must be damaged."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e30 else None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
