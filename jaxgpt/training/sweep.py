"""Sweeps: trains a run for every combination of values of some fields, and compares their losses.

Each point is a normal run in a folder of its own, trained in this process. Repeating a sweep skips
the points that are finished and resumes the others, and more values or seeds may be added. A point
that fails does not end the sweep.
"""

import csv
import json
import math
import re
import traceback
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from jaxgpt import config
from jaxgpt.accelerators import check_device
from jaxgpt.config import Config
from jaxgpt.errors import InputError, TrainingError
from jaxgpt.paths import expand
from jaxgpt.signals import Signals
from jaxgpt.training import loop
from jaxgpt.training.inputs import check_models
from jaxgpt.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS = "val_loss"
PLANNED = "planned.json"
"""The file with the options of a point, before the data has decided any of them."""
MEASURED = ("loss", "best", "seconds", "tokens_per_second")
"""The numbers of an outcome."""
FREE = ("name", "runs", "require", "checkpoint", "telemetry")
"""Parts of a config that may differ when a point resumes."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    values: dict[str, Any]
    """The values of the fields that vary, without the seed."""
    cfg: Config


@dataclass(frozen=True)
class Outcome:
    """What a point has reached."""

    point: Point
    loss: float = math.nan
    """The validation loss at the last step."""
    best: float = math.nan
    """The lowest validation loss."""
    seconds: float = math.nan
    """The wall time of the run, over all its starts."""
    tokens_per_second: float = math.nan
    """The mean training speed."""
    error: str = ""
    """Why there is no loss."""


@dataclass(frozen=True)
class Row:
    """The outcomes of all seeds with the same values."""

    values: dict[str, Any]
    outcomes: list[Outcome]

    @property
    def seeds(self) -> int:
        """The number of seeds that have a loss."""
        return sum(not each.error for each in self.outcomes)

    def mean(self, name: str) -> float:
        """The mean of a number over the seeds that have one; NaN if none has."""
        return fmean(found) if (found := self._numbers(name)) else math.nan

    def spread(self, name: str) -> float:
        """The standard deviation of a number over seeds; NaN for fewer than two."""
        return stdev(found) if len(found := self._numbers(name)) > 1 else math.nan

    def _numbers(self, name: str) -> list[float]:
        return [getattr(each, name) for each in self.outcomes if not each.error]


def sweep(
    path: str,
    values: Sequence[Sequence[str]],
    seeds: Sequence[int] = (),
    options: Sequence[str] = (),
    name: str = "",
) -> int:
    """Trains the grid of all values and seeds, and prints and writes a table and a plot.

    Args:
        path: A config file.
        values: For each field that varies: its name, then its values.
        seeds: The seeds that every combination is trained with; by default the config's.
        options: Options of `train.py` that all points share.
        name: The name of the sweep, which is its folder under `runs`; by default the config's name
            with "-sweep".

    Returns:
        The exit status: 0; 1 if a point failed; 128 plus the number of a signal that ended it.

    Raises:
        InputError: A field, a value or a seed is invalid. Nothing has been trained then.
    """
    points = plan(path, values, seeds, options, name)
    for point in points:
        check_device(point.cfg.require)
    folder = points[0].cfg.folder.parent
    outcomes = []
    with Signals() as signals:
        for number, point in enumerate(points, 1):
            print(f"{number:>3}/{len(points)}  {point.cfg.name}", end="  ", flush=True)
            outcome = train(point, signals)
            if signals.received:
                print("stopped; the same command resumes")
                break
            outcomes.append(outcome)
            print(outcome.error or f"{LOSS} {outcome.loss:.4f}", flush=True)
    rows = group(outcomes)
    if outcomes:
        print(f"\n{table(rows)}")
        for file in write(rows, folder):
            print(f"wrote {file}")
    if signals.received:
        return 128 + signals.received
    return int(any(outcome.error for outcome in outcomes))


def plan(
    path: str,
    values: Sequence[Sequence[str]],
    seeds: Sequence[int] = (),
    options: Sequence[str] = (),
    name: str = "",
) -> list[Point]:
    """The points of a sweep, with checked configs. See `sweep`."""
    fields = [each[0].removeprefix("--").replace("-", "_") for each in values if each]
    if not fields or any(len(each) < 2 for each in values):
        raise InputError(
            "there is nothing to vary; give a field and its values, such as "
            "--values optim.learning_rate 1e-3 3e-3 1e-2"
        )
    for field in fields:
        if fields.count(field) > 1:
            raise InputError(f"--values {field} is there twice; give all its values at once")
        if field in ("name", "runs", "seed", "resume"):
            instead = "use --seeds" if field == "seed" else "the sweep itself sets it"
            raise InputError(f"--values cannot vary {field}; {instead}")
    points = []
    for texts in product(*(each[1:] for each in values)):
        given = [f"--{field}={text}" for field, text in zip(fields, texts, strict=True)]
        cfg = config.from_command_line([path, *options, *given], Path(path))
        if cfg.parallel.processes != 1:
            raise InputError("a sweep trains in one process; remove parallel.processes")
        if cfg.is_copied:
            raise InputError(
                f"the runs of a sweep stay in a folder; set runs={cfg.runs} to one, on a mounted "
                "bucket if you like, and leave checkpoint.local empty",
                field="runs",
            )
        chosen = {f: _value(cfg, f, text) for f, text in zip(fields, texts, strict=True)}
        runs = str(expand(cfg.runs) / (name or f"{cfg.name}-sweep"))
        for seed in seeds or (cfg.seed,):
            words = [f"{word}={_shown(v)}" for word, v in {**chosen, "seed": seed}.items()]
            title = re.sub(r"[^-+=,.\w]", "_", ",".join(words))
            points.append(Point(chosen, replace(cfg, seed=seed, name=title, runs=runs)))
    titles = [point.cfg.name for point in points]
    for point in points:
        if titles.count(point.cfg.name) > 1:
            raise InputError(f"two points of the sweep are {point.cfg.name}; remove one of them")
        check_models(point.cfg)
        point.cfg.check()
        _refuse_changed(point.cfg)
    return points


def _value(cfg: Config, field: str, text: str) -> Any:
    """The value of a field; of an option that is no field, such as depth, the number it is."""
    found: Any = cfg
    for part in field.split("."):
        found = getattr(found, part, None)
    if found is None:
        with suppress(ValueError):
            return float(text)
        return text
    return found


def _refuse_changed(cfg: Config) -> None:
    """Raises InputError if the folder of a point has a run with other options."""
    file = cfg.folder / PLANNED
    if not file.exists():
        return
    then, now = config.to_dict(config.read(file)), config.to_dict(cfg)
    changed = [part for part in now if part not in FREE and then[part] != now[part]]
    if changed:
        raise InputError(
            f"{cfg.folder} was trained with other options of {', '.join(changed)}; set another "
            "--name for this sweep, or remove that folder"
        )


def train(point: Point, signals: Signals) -> Outcome:
    """Trains a point to its end, unless it is finished. What it prints goes to `log.txt`."""
    folder = point.cfg.folder
    if is_finished(folder):
        return read_outcome(point)
    config.save(point.cfg, folder / PLANNED)
    with (folder / "log.txt").open("a") as log, redirect_stdout(log):
        try:
            loop.run(point.cfg, signals)
        except (InputError, TrainingError) as error:
            return Outcome(point, error=f"failed: {error}")
        except Exception as error:  # of the device, such as too little memory
            traceback.print_exc(file=log)
            first = str(error).partition("\n")[0]
            return Outcome(point, error=f"failed: {type(error).__name__}: {first}")
    return read_outcome(point)


def is_finished(folder: Path) -> bool:
    """Whether a point has been trained to its end."""
    return any("finished" in record for record in read_metrics(folder / "metrics.jsonl"))


def read_outcome(point: Point) -> Outcome:
    """The outcome of a point, from its metrics."""
    records = read_metrics(point.cfg.folder / "metrics.jsonl")

    def numbers(name: str) -> list[float | int]:
        return [v for record in records if isinstance(v := record.get(name), int | float)]

    times = [spent for record in records if isinstance(spent := record.get("goodput"), dict)]
    losses = numbers(LOSS)
    if not losses:
        return Outcome(point, error=f"failed: no {LOSS} in {point.cfg.folder / 'metrics.jsonl'}")
    return Outcome(
        point,
        losses[-1],
        min(losses),
        sum(sum(spent.values()) for spent in times),
        fmean(numbers("tokens_per_second") or [math.nan]),
    )


def group(outcomes: Iterable[Outcome]) -> list[Row]:
    """The outcomes of equal values in one row, the lowest loss first and failed ones last."""
    rows: dict[str, Row] = {}
    for outcome in outcomes:
        values = outcome.point.values
        rows.setdefault(repr(values), Row(values, [])).outcomes.append(outcome)
    return sorted(rows.values(), key=lambda row: (math.isnan(m := row.mean("loss")), m))


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal, with the best marked."""
    lines = [[*rows[0].values, "seeds", LOSS, "best", "seconds", "tokens/s", ""]]
    for place, row in enumerate(rows):
        error = row.spread("loss")
        failed = len(row.outcomes) - row.seeds
        notes = ["<- best"] if row.seeds and not place else []
        numbers = [
            f"{row.mean('loss'):.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}"),
            f"{row.mean('best'):.4f}",
            f"{row.mean('seconds'):.0f}",
            f"{row.mean('tokens_per_second'):,.0f}",
        ]
        lines.append(
            [
                *map(_shown, row.values.values()),
                str(row.seeds),
                *(numbers if row.seeds else "-" * len(numbers)),
                ", ".join(notes + ([f"{failed} failed"] if failed else [])),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the results of a sweep to its folder.

    Args:
        rows: The rows of the table.
        folder: The folder.

    Returns:
        The files: `sweep.json` with every run, `sweep.csv` with the rows, and the plot `sweep.png`
        if there is a loss.

    Raises:
        InputError: A file cannot be written.
    """
    points = []
    for outcome in (each for row in rows for each in row.outcomes):
        cfg = outcome.point.cfg
        point = {"values": outcome.point.values, "seed": cfg.seed, "run": str(cfg.folder)}
        found = {name: getattr(outcome, name) for name in MEASURED}
        points.append(point | ({"error": outcome.error} if outcome.error else found))
    lines = [
        {
            **row.values,
            "seeds": row.seeds,
            **{name: row.mean(name) for name in MEASURED},
            "loss_std": row.spread("loss"),
        }
        for row in rows
    ]
    figure = draw(rows, folder.name)
    names = ["sweep.json", "sweep.csv", *(["sweep.png"] if figure else [])]
    files = [folder / name for name in names]
    try:
        files[0].write_text(json.dumps(points, indent=2, default=str) + "\n")
        with files[1].open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
        if figure:
            figure.savefig(files[2])
    except OSError as error:
        raise InputError(
            f"{error.filename or folder} cannot be written: {error.strerror}; make room"
        ) from None
    return files


def draw(rows: Sequence[Row], title: str) -> "Figure | None":
    """The plot of the loss over the first field, with a line for each value of the other fields.

    The axis of positive numbers that span a factor of ten is logarithmic. Error bars are standard
    deviations over seeds. None if no row has a loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first, *others = rows[0].values
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.seeds:
            label = ", ".join(f"{field} {_shown(row.values[field])}" for field in others)
            lines.setdefault(label, []).append(row)
    if not lines:
        return None
    values = [row.values[first] for row in rows]
    numeric = all(type(value) in (int, float) for value in values)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, line in lines.items():
        ordered = sorted(line, key=lambda row: values.index(row.values[first]))
        if numeric:
            ordered.sort(key=lambda row: row.values[first])
        places = [row.values[first] if numeric else str(row.values[first]) for row in ordered]
        means = [row.mean("loss") for row in ordered]
        errors = [row.spread("loss") for row in ordered]
        axes.errorbar(places, means, errors, label=label, marker="o", markersize=4, capsize=3)
    if numeric and min(values) > 0 and max(values) >= 10 * min(values):
        axes.set_xscale("log")
    axes.set(xlabel=first, ylabel="validation loss", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if others:
        axes.legend(frameon=False)
    return figure
