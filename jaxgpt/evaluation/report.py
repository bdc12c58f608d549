"""Reports on runs: curves, samples, evaluations and what they cost, as Markdown and HTML.

Everything comes from the runs' folders (see `history`), so a report can be written at any time,
also while a run is still training.
"""

import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from jaxgpt import config
from jaxgpt.errors import InputError
from jaxgpt.evaluation.charts import Curve, line_chart, smooth
from jaxgpt.evaluation.document import (
    Block,
    Cell,
    Charts,
    Code,
    Document,
    Facts,
    Section,
    Share,
    Table,
    Text,
)
from jaxgpt.evaluation.history import RunHistory, read_history
from jaxgpt.objectives import UnknownObjective
from jaxgpt.strict_json import JsonObject

WIDE, NARROW = (920, 380), (460, 300)
"""Sizes of a chart that fills the page, and of one on a phone or beside another."""


def write_report(
    folders: Sequence[str | Path], folder: str | Path, price: float = 0.0, title: str = ""
) -> Path:
    """Writes `report.md` and `report.html` on one run, or on several to compare.

    Args:
        folders: The runs' folders; those of the stages of a pipeline in their order.
        folder: Where to write.
        price: What a device costs per hour, in any currency; 0: the report has no cost.
        title: The title; empty: made from the names of the runs.

    Returns:
        The path of the HTML file.

    Raises:
        InputError: A folder is not that of a run, the price is negative, or nothing can be written.
    """
    if not folders:
        raise InputError("there is no run; pass the folder of one or more")
    if not (price >= 0 and math.isfinite(price)):
        raise InputError(f"price={price}; set it to what a device costs per hour", field="price")
    runs = [read_history(each) for each in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(each)) for run, each in zip(runs, folders, strict=True)]
    if len(runs) == 1:
        one = runs[0]
        document = Document(title or one.name, _subtitle(one), _blocks(one, price))
    else:
        names = ", ".join(run.name for run in runs)
        document = Document(
            title or f"{len(runs)} runs compared", names, [*_comparison(runs, price)]
        )
    return document.write(Path(folder).expanduser())


def _subtitle(run: RunHistory) -> str:
    steps = f"step {run.step:,}" + (f" of {run.steps:,}" if run.steps else "")
    parts = [str(run.options.get("objective.type", "")), f"{run.state}: {steps}"]
    if run.sessions:
        began, ended = _date(run.sessions[0].began), _date(run.sessions[-1].ended)
        day, _, hour = ended.partition(" ")
        parts.append(f"{began} to {hour if began.startswith(day) else ended}")
    return ", ".join(part for part in parts if part)


def _blocks(run: RunHistory, price: float) -> list[Block]:
    """The sections of a report on one run; those without content are left out."""
    sections = {
        "Training": _curves(run),
        "Held-out data": _held_out(run),
        "Tasks": _evaluation([run]),
        "Samples": _samples(run),
        "Time and cost": _time(run, price),
        "Model": _model(run),
        "Data and tokenizer": _data(run),
        "Lineage and versions": _lineage(run),
        "Options": _options(run),
    }
    blocks: list[Block] = [Facts(_facts(run, price))]
    if run.notes:
        blocks.append(Table([[note] for note in run.notes], ["not in this report"]))
    return blocks + [Section(title, found) for title, found in sections.items() if found]


def _facts(run: RunHistory, price: float) -> list[tuple[str, str]]:
    """The figures on top of a report."""
    facts = [
        (label, f"{value:.4f}")
        for name, label in (
            ("val_loss", "validation loss"),
            ("val_bits_per_byte", "bits per byte"),
            ("val_accuracy", "validation accuracy"),
            ("test_loss", "test loss"),
            ("test_accuracy", "test accuracy"),
        )
        if (value := run.last(name)) is not None
    ]
    if (best := run.best("val_loss")) and best[1] < (run.last("val_loss") or 0):
        facts.append(("best validation loss", f"{best[1]:.4f} at step {best[0]:,}"))
    if not facts and (loss := run.last("loss")) is not None:
        facts.append(("training loss", f"{loss:.4f}"))
    if run.parameters:
        facts.append(("parameters", _short(_count(run.parameters))))
    if (tokens := run.tokens_per_step) and run.step:
        facts.append(("tokens trained on", _short(tokens * run.step)))
    if run.seconds:
        facts.append(("time", _duration(run.seconds)))
    if rate := _typical(run, "tokens_per_second"):
        facts.append(("tokens/s", f"{rate:,.0f}"))
    if mfu := _typical(run, "mfu"):
        facts.append(("MFU", f"{mfu:.1%}"))
    if devices := _devices(run.facts):
        facts.append(("devices", devices))
    if price and (hours := run.device_hours) is not None:
        facts.append(("cost", f"{hours * price:,.2f}"))
    return facts


def _devices(facts: JsonObject) -> str:
    """The devices of a session, such as "8 x TPU v5 lite"; empty if they were not recorded."""
    known = (facts.get("devices"), facts.get("device_kind"))
    return " x ".join(str(each) for each in known if each is not None)


def _typical(run: RunHistory, name: str) -> float | None:
    """The median of a metric."""
    _, values = run.curve(name)
    return sorted(values)[len(values) // 2] if values else None


def _chart(
    curves: Sequence[Curve], title: str, size: tuple[int, int], **options: bool | str
) -> str:
    width, height = size
    return line_chart(curves, title=title, width=width, height=height, **options)  # type: ignore[arg-type]


def _curves(run: RunHistory) -> list[Block]:
    """Loss, learning rate, gradient norm, throughput and other metrics over the steps."""
    loss: list[Curve] = []
    steps, values = run.curve("loss")
    if values:
        loss += [
            Curve("training, each step", steps, values, 0, "faint"),
            Curve("training, smoothed", steps, smooth(values), 0),
        ]
    parts = [n for n in run.metrics("val_loss") if n == "val_loss" or n.startswith("val_loss/")]
    for color, name in enumerate(parts, 1):
        label = name.replace("val_loss/", "validation: ").replace("val_loss", "validation")
        loss.append(Curve(label, *run.curve(name), color, "points"))
    blocks: list[Block] = []
    if wide := _chart(loss, "Loss", WIDE):
        blocks.append(Charts([wide], [_chart(loss, "Loss", NARROW)]))
    small = []
    for name, title in _TITLES.items():
        steps, values = run.curve(name)
        if any(values):
            curves = [Curve("", steps, values, 0)]
            if name == "grad_norm":
                curves = _smoothed(steps, values)
            small.append(_chart(curves, title, NARROW, from_zero=True))
    for name in run.metrics("val_"):
        steps, values = run.curve(name)
        if len(values) > 1 and not name.startswith("val_loss") and "/" not in name:
            curve = Curve("", steps, values, 1, "points")
            small.append(_chart([curve], _spelled(name), NARROW))
    for name in run.metrics(""):
        steps, values = run.curve(name)
        shown = name in _TITLES or name in ("loss", "step", "time", "finished")
        if not shown and not name.startswith(("val_", "test_")) and len(values) > 1:
            small.append(_chart(_smoothed(steps, values), _spelled(name), NARROW))
    if small:
        blocks.append(Charts(small))
    return blocks


_TITLES = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Training tokens per second",
    "mfu": "Model FLOPs utilization (MFU)",
    "skipped": "Skipped steps",
}


def _smoothed(steps: Sequence[float], values: Sequence[float]) -> list[Curve]:
    """A smoothed curve in front of the values."""
    return [Curve("", steps, values, 0, "faint"), Curve("", steps, smooth(values), 0)]


def _spelled(name: str) -> str:
    """The name of a metric as a title."""
    words = {"val": "validation", "kl": "KL"}
    title = " ".join(words.get(word, word) for word in name.split("_"))
    return title[:1].upper() + title[1:]


def _evaluation(runs: Sequence[RunHistory]) -> list[Block]:
    """The results of runs on tasks, with their standard errors; a column for each run."""
    found: dict[tuple[str, ...], dict[int, str]] = {}
    for number, run in enumerate(runs):
        for result in run.evaluations:
            about = [str(result.get(key, "")) for key in ("task", "shots", "examples")]
            errors = result.get("standard_errors")
            for metric, value in result["metrics"].items():
                error = errors.get(metric) if isinstance(errors, dict) else None
                found.setdefault((*about, metric), {})[number] = _measured(value, error)
    if not found:
        return []
    rows = [[*about, *(v.get(n, "") for n in range(len(runs)))] for about, v in found.items()]
    names = [run.name for run in runs] if len(runs) > 1 else ["value"]
    head = ["task", "shots", "examples", "metric", *names]
    return [
        Table(rows, head, right=(1, 2, *range(4, len(head)))),
        Text("± is the standard error of the mean over the examples."),
    ]


def _held_out(run: RunHistory) -> list[Block]:
    """All metrics on validation and test data, when they were first measured and at the end."""
    rows: list[list[Cell]] = []
    for name in run.metrics("val_") + run.metrics("test_"):
        steps, values = run.curve(name)
        if values:
            several = len(values) > 1
            first = [f"{int(steps[0]):,}", f"{values[0]:.4f}"] if several else ["", ""]
            rows.append([name, *first, f"{int(steps[-1]):,}", f"{values[-1]:.4f}"])
    head = ["metric", "first step", "first value", "last step", "last value"]
    return [Table(rows, head, right=range(1, 5))] if rows else []


def _measured(value: object, error: object) -> str:
    if not isinstance(value, int | float):
        return ""
    shown = f"{value:.4f}"
    return f"{shown} ± {error:.4f}" if isinstance(error, int | float) else shown


def _samples(run: RunHistory) -> list[Block]:
    """The newest sample, and folded those before it."""
    steps = sorted(step for step in run.samples if step <= run.step)
    if not steps:
        return []
    *earlier, last = steps
    blocks: list[Block] = [Text(f"After step {last:,}:"), Code(run.samples[last])]
    for step in reversed(earlier):
        blocks.append(Section(f"After step {step:,}", [Code(run.samples[step])], folded=True))
    return blocks


def _time(run: RunHistory, price: float) -> list[Block]:
    """Where the time went, on which devices, and what they cost."""
    blocks: list[Block] = []
    goodput = run.goodput
    rows: list[list[Cell]] = []
    if wall := sum(goodput.values()):
        rows = [
            [_BUCKETS.get(name, name), f"{seconds:,.1f}", Share(seconds / wall)]
            for name, seconds in goodput.items()
        ]
        rows.append(["total", f"{wall:,.1f}", Share(1.0)])
        blocks.append(Table(rows, ["", "seconds", "share"], right=(1,)))
    rows = []
    for session in run.sessions:
        facts = session.facts
        ended = "" if session.goodput else " (killed, or still running)"
        rows.append(
            [
                _date(session.began),
                f"{_duration(session.seconds)}{ended}",
                _devices(facts) or "not recorded",
                str(facts.get("compute", "")),
            ]
        )
    if rows:
        blocks.append(Table(rows, ["process started", "time", "devices", "computation"]))
    hours = run.device_hours
    if hours is not None and rows:
        cost = f"; at {price:g} per device and hour they cost {hours * price:,.2f}" if price else ""
        blocks.append(Text(f"{hours:,.3g} device hours{cost}."))
    elif price and rows:
        blocks.append(Text("The cost is not known, because the run did not record its devices."))
    return blocks


_BUCKETS = {
    "init": "preparation",
    "compile": "compilation",
    "data": "waiting for data",
    "step": "training steps",
    "save": "saving",
    "eval": "evaluation",
}


def _model(run: RunHistory) -> list[Block]:
    """The parameters by part, with shapes and numbers; those of all layers in one row."""
    blocks: list[Block] = []
    parts: dict[tuple[str, str], int] = {}
    for path, spec in run.parameters.items():
        part = re.sub(r"(^|/)(\w*blocks)/\d+/", r"\1\2/*/", path)
        parts[part, spec] = parts.get((part, spec), 0) + 1
    total = _count(run.parameters)
    if total:
        rows: list[list[Cell]] = []
        for (part, spec), times in parts.items():
            dtype, shape = _leaf(spec)
            each = math.prod(shape)
            rows.append(
                [
                    part,
                    " x ".join(map(str, shape)) or "scalar",
                    dtype,
                    str(times),
                    f"{each * times:,}",
                    Share(each * times / total),
                ]
            )
        rows.append(["total", "", "", "", f"{total:,}", Share(1.0)])
        head = ["parameter", "shape", "dtype", "times", "numbers", "share"]
        blocks.append(Table(rows, head, right=(3, 4)))
    if run.config is not None:
        flops = run.config.model.flops_per_token(run.config.context)
        line = f"Training takes {_short(flops)}FLOP per token, forward and backward"
        if rate := _typical(run, "tokens_per_second"):
            line += f", so {rate:,.0f} tokens per second are {_short(flops * rate)}FLOP/s"
        blocks.append(Text(line + "."))
    return blocks


def _leaf(spec: str) -> tuple[str, list[int]]:
    """The dtype and the shape of "float32[4096,128]"."""
    dtype, _, shape = str(spec).partition("[")
    return dtype, [int(size) for size in re.findall(r"\d+", shape)]


def _count(parameters: dict[str, str]) -> int:
    return sum(math.prod(_leaf(spec)[1]) for spec in parameters.values())


def _data(run: RunHistory) -> list[Block]:
    options = run.options
    rows: list[list[Cell]] = [
        ["paths", _value(options.get("data.paths"))],
        ["validation paths", _value(options.get("data.val_paths"))],
        ["size", str(run.facts.get("data", ""))],
        ["tokens per row", _value(options.get("train.context") or options.get("model.T"))],
        ["rows per step", _value(options.get("train.batch"))],
    ]
    tokenizer = run.metadata.get("tokenizer")
    tokenizer = tokenizer if isinstance(tokenizer, dict) else {}
    specials = tokenizer.get("specials")
    rows += [
        ["tokenizer", str(tokenizer.get("kind") or options.get("tokenizer.kind") or "")],
        ["vocabulary", _value(options.get("model.V"))],
        ["special tokens", " ".join(specials) if isinstance(specials, dict) else ""],
        ["tokenizer's fingerprint", str(tokenizer.get("fingerprint", ""))[:16]],
    ]
    rows = [row for row in rows if row[1]]
    return [Table(rows)] if rows else []


def _lineage(run: RunHistory) -> list[Block]:
    lineage = run.metadata.get("lineage")
    lineage = lineage if isinstance(lineage, dict) else {}
    rows: list[list[Cell]] = []
    for name, label in (("started_from", "started from"), ("teacher", "teacher")):
        if isinstance(source := lineage.get(name), dict):
            path, *about = (str(value) for value in source.values())
            keys = [*source][1:]
            more = ", ".join(f"{key} {value}" for key, value in zip(keys, about, strict=True))
            rows.append([label, f"{path} ({more})" if more else path])
    if not rows and run.options.get("start"):
        rows.append(["started from", _value(run.options["start"])])
    for name, label in (
        ("resumed_after", "resumed after step"),
        ("went_back_to", "went back to step"),
    ):
        if steps := lineage.get(name):
            rows.append([label, _value(steps)])
    versions = run.metadata.get("versions")
    if isinstance(versions, dict):
        rows += [[str(name), str(version)] for name, version in versions.items()]
    for name, label in (("platform", "platform"), ("cpus", "CPU cores of the host")):
        if run.facts.get(name):
            rows.append([label, str(run.facts[name])])
    return [Table(rows)] if rows else []


def _options(run: RunHistory) -> list[Block]:
    """The options that differ from the defaults."""
    if run.config is None:
        return []
    rows: list[list[Cell]] = [[*row] for row in config.differences(run.config)]
    if isinstance(run.config.objective, UnknownObjective):
        own = {n: v for n, v in run.options.items() if n.startswith("objective.")}
        rows = [row for row in rows if not str(row[0]).startswith("objective")]
        rows += [[name.removesuffix(".type"), config.show_value(v), ""] for name, v in own.items()]
    if not rows:
        return [Text("All options have their defaults.")]
    return [Table(rows, ["option", "value", "default"])]


def _comparison(runs: Sequence[RunHistory], price: float) -> Iterable[Block]:
    """The results of several runs side by side, their curves on one plot, and what differs."""
    yield Section("Results", [_results_table(runs, price)])
    if charts := _common_curves(runs):
        yield Section("Curves", charts)
    if evaluation := _evaluation(runs):
        yield Section("Tasks", evaluation)
    yield Section("Options that differ", [_differing_options(runs)])
    for run in runs:
        yield Section(run.name, [Text(_subtitle(run)), *_blocks(run, price)])


def _results_table(runs: Sequence[RunHistory], price: float) -> Table:
    columns: dict[str, list[str]] = {}
    for number, run in enumerate(runs):
        shown = {"objective": str(run.options.get("objective.type", "")), "state": run.state}
        shown |= {"step": f"{run.step:,}"}
        if (loss := run.last("loss")) is not None:
            shown["training loss"] = f"{loss:.4f}"
        shown |= dict(_facts(run, price))
        for name, value in shown.items():
            columns.setdefault(name, [""] * len(runs))[number] = value
    rows = [[run.name, *(cells[n] for cells in columns.values())] for n, run in enumerate(runs)]
    return Table(rows, ["run", *columns], right=range(3, 1 + len(columns)))


def _common_curves(runs: Sequence[RunHistory]) -> list[Block]:
    """The training and the validation loss of all runs, over tokens if their batches differ."""
    per_step = {run.tokens_per_step for run in runs}
    by_tokens = len(per_step) > 1 and None not in per_step
    label = "training tokens" if by_tokens else "step"
    blocks: list[Block] = []
    for name, title in (("loss", "Training loss, smoothed"), ("val_loss", "Validation loss")):
        curves = []
        for number, run in enumerate(runs):
            steps, values = run.curve(name)
            scale = (run.tokens_per_step or 1) if by_tokens else 1
            x = [step * scale for step in steps]
            if name == "loss":
                curves.append(Curve(run.name, x, smooth(values) if values else [], number))
            else:
                curves.append(Curve(run.name, x, values, number, "points"))
        wide, narrow = (_chart(curves, title, size, x_label=label) for size in (WIDE, NARROW))
        if wide:
            blocks.append(Charts([wide], [narrow]))
    return blocks


def _differing_options(runs: Sequence[RunHistory]) -> Block:
    names = dict.fromkeys(name for run in runs for name in run.options)
    rows: list[list[Cell]] = []
    for name in names:
        shown = [
            config.show_value(run.options[name]) if name in run.options else "" for run in runs
        ]
        if len(set(shown)) > 1 and name != "name":
            rows.append([name.removesuffix(".type"), *shown])
    if not rows:
        return Text("All options are the same.")
    return Table(rows, ["option", *(run.name for run in runs)])


def _value(value: object) -> str:
    if isinstance(value, list):
        shown = " ".join(str(each) for each in value[:20])
        return f"{shown} and {len(value) - 20} more" if len(value) > 20 else shown
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


def _short(number: float) -> str:
    """A number with three digits and a unit: 1.26M."""
    for unit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{suffix}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    """A duration in its two largest units: 4 min 12 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _date(moment: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
    except (OverflowError, ValueError, OSError):  # the record is damaged
        return "unknown time"
