"""Verifies the files of runs, and lists runs with their progress."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jaxgpt import config, data
from jaxgpt.errors import InputError
from jaxgpt.manifest import MANIFEST, find_damage
from jaxgpt.paths import expand
from jaxgpt.tokenizer import from_json
from jaxgpt.training import checkpoint
from jaxgpt.training.lock import find_holder
from jaxgpt.training.metrics import find_bad_lines, read_metrics


@dataclass(frozen=True)
class Verified:
    """The result of verifying one folder or file."""

    path: Path
    bytes: int
    """The size of its files."""
    damage: tuple[str, ...] = ()
    """A message for each damaged file; empty if all are intact."""


def verify(path: str | Path) -> list[Verified]:
    """Verifies the hashes of a run, a checkpoint or an exported model.

    Args:
        path: A run's folder, of which the checkpoints, the cached training tokens and the metrics
            are verified; or a folder with a manifest.

    Returns:
        A result for each part.

    Raises:
        InputError: The path is not such a folder.
    """
    folder = expand(path)
    if (folder / MANIFEST).is_file():
        return [_verify_folder(folder)]
    if not (folder / "checkpoints").is_dir():
        raise InputError(
            f"{path} is not a run's folder and has no {MANIFEST}; use a folder in `runs`, a "
            "checkpoint or an exported model"
        )
    found = _verify_steps(folder / "checkpoints")
    for one in reversed(found):
        if not one.damage:
            found += _verify_tokens(one.path)
            break
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        found.append(Verified(metrics, metrics.stat().st_size, tuple(find_bad_lines(metrics))))
    return found


def _verify_steps(folder: Path) -> list[Verified]:
    """Verifies every checkpoint of a run, except those that the run deletes in the meantime."""
    found = []
    for step in checkpoint.step_folders(folder):
        with suppress(FileNotFoundError):
            found.append(_verify_folder(folder / str(step), _check_step))
    return found


def _check_step(folder: Path) -> list[str]:
    opened = checkpoint.OpenCheckpoint(folder, None)
    opened.close()
    return opened.damage


def _verify_folder(folder: Path, check: Callable[[Path], list[str]] = find_damage) -> Verified:
    try:
        return Verified(folder, size_of(folder), tuple(check(folder)))
    except InputError as error:  # a file cannot be read, or a newer jaxgpt wrote it
        return Verified(folder, size_of(folder), (str(error),))


def _verify_tokens(folder: Path) -> list[Verified]:
    """Verifies the entries of the token cache that the run of a checkpoint uses."""
    about = checkpoint.read_metadata(folder)
    cfg = config.from_dict(config.Config, about["config"])
    if not isinstance(cfg.data, data.DataConfig):
        return []
    vocab_size = from_json(about["tokenizer"]).vocab_size
    found = []
    for entry in dict.fromkeys(data.token_entries(cfg.data, about["data"])):
        if entry.exists():
            check = partial(data.find_entry_damage, vocab_size=vocab_size)
            found.append(_verify_folder(entry, check))
    return found


def size_of(folder: Path) -> int:
    """Returns the size in bytes of all files in a folder and its subfolders."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@dataclass(frozen=True)
class RunState:
    """The progress of a run."""

    name: str
    """The run's folder, relative to the folder of runs."""
    step: int
    """The step of the newest checkpoint; 0 if there is none."""
    steps: int
    """The number of steps in the run's config; 0 if it cannot be read."""
    loss: float | None
    """The last training loss."""
    val_loss: float | None
    """The last validation loss."""
    best: float | None
    """The lowest validation loss."""
    bytes: int
    state: str
    """`training` (with the process), `finished`, `stopped` or `empty`."""
    damaged: tuple[str, ...]
    """The names of damaged checkpoints, including those renamed to STEP.damaged."""
    updated: float
    """The Unix time of the last record."""


def list_runs(folder: str | Path, hash_files: bool = True) -> list[RunState]:
    """Lists the runs in a folder with their progress, sorted by name.

    Args:
        folder: A folder of runs. The stages of a pipeline are in a folder of their own in it.
        hash_files: Whether to verify the files of all checkpoints, which takes about 1 s per GB. If
            not, only checkpoints without a manifest or named STEP.damaged count as damaged.

    Raises:
        InputError: The folder does not exist.
    """
    root = expand(folder)
    if not root.is_dir():
        raise InputError(f"there is no folder {folder}; use the folder that contains the runs")
    marks = ("checkpoints", "config.json", "metrics.jsonl")

    def find(inside: Path, depth: int) -> Iterator[Path]:
        for path in sorted(inside.iterdir()):
            if any((path / mark).exists() for mark in marks):
                yield path
            elif depth and path.is_dir():
                yield from find(path, depth - 1)

    return [_state_of(run, str(run.relative_to(root)), hash_files) for run in find(root, 1)]


def _state_of(run: Path, name: str, hash_files: bool) -> RunState:
    checkpoints = run / "checkpoints"
    records = read_metrics(run / "metrics.jsonl")
    steps = checkpoint.steps_in(checkpoints)
    damaged = sorted(path.name for path in checkpoints.glob("*.damaged*"))
    if hash_files:
        damaged += [one.path.name for one in _verify_steps(checkpoints) if one.damage]
    else:
        damaged += [str(s) for s in checkpoint.step_folders(checkpoints) if s not in steps]
    step = steps[-1] if steps else 0
    losses = _values(records, "loss")
    val_losses = _values(records, "val_loss")
    holder = find_holder(run)
    finished = any(record.get("finished") == step for record in records)
    return RunState(
        name=name,
        step=step,
        steps=_wanted_steps(run),
        loss=losses[-1] if losses else None,
        val_loss=val_losses[-1] if val_losses else None,
        best=min(val_losses, default=None),
        bytes=size_of(run),
        state=f"training ({holder})" if holder else _name_state(finished, step),
        damaged=tuple(damaged),
        updated=float((_values(records, "time") or [run.stat().st_mtime])[-1]),
    )


def _name_state(finished: bool, step: int) -> str:
    if finished:
        return "finished"
    return "stopped" if step else "empty"


def _values(records: list[dict[str, object]], name: str) -> list[float]:
    return [value for r in records if isinstance(value := r.get(name), int | float)]


def _wanted_steps(run: Path) -> int:
    try:
        return config.read(run / "config.json").train.steps
    except (InputError, OSError):  # written by another version, or not written yet
        return 0


def show_verified(found: list[Verified], seconds: float) -> str:
    """Formats the results of `verify`: a line for each part, and a summary."""
    lines = []
    for one in found:
        state = "DAMAGED" if one.damage else "intact"
        lines.append(f"{state:<8} {_size(one.bytes):>9}  {one.path}")
        lines += [f"           {message}" for message in one.damage]
    intact, total = sum(not one.damage for one in found), sum(one.bytes for one in found)
    lines.append(f"{intact} of {len(found)} intact; {_size(total)} in {seconds:.1f} s")
    return "\n".join(lines)


def show_runs(states: list[RunState]) -> str:
    """Formats runs as a table."""
    head = (
        *("run", "step", "loss", "val_loss", "best_val_loss"),
        *("size", "updated", "checkpoints", "state"),
    )
    rows = [
        (
            one.name,
            f"{one.step}/{one.steps or '?'}",
            *("-" if v is None else f"{v:.4f}" for v in (one.loss, one.val_loss, one.best)),
            _size(one.bytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(one.updated)),
            f"damaged: {', '.join(one.damaged)}" if one.damaged else "intact" if one.step else "-",
            one.state,
        )
        for one in states
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
