"""Finds and reads the checkpoints of a run, which may be training at the same time."""

import difflib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxgpt.errors import InputError
from jaxgpt.manifest import MANIFEST, find_damage, read_manifest
from jaxgpt.sharding import PyTree
from jaxgpt.training.checkpoint.arrays import as_abstract, list_some, restore_items
from jaxgpt.training.lock import flock

Metadata = dict[str, Any]  # JSON values: what a checkpoint says of itself, by name

FORMAT = 2  # version of a checkpoint's layout; 1 had no format.json and no evaluation.json
EVALUATION = "evaluation.json"
TRIES = 20  # attempts to open a run's newest checkpoint while older ones are being deleted
logger = logging.getLogger(__name__)


class OpenCheckpoint:
    """An open checkpoint; its run does not delete it while this object exists.

    A shared `flock` on the folder protects it, if the file system has locks.
    """

    folder: Path
    damage: list[str]
    """What is wrong with the metadata and the items for which it was opened; empty if intact."""
    metadata: Metadata
    """The metadata, see `read_metadata`; only set if the checkpoint is intact."""

    def __init__(self, folder: Path, items: Collection[str] | None) -> None:
        """Opens and verifies a checkpoint.

        Args:
            folder: The folder of one step.
            items: Names of the items whose files are verified; None: all.

        Raises:
            FileNotFoundError: The checkpoint was deleted or is being deleted.
            InputError: A file cannot be read, or a newer version of jaxgpt wrote the checkpoint.
        """
        self.folder = folder
        self._fd = os.open(folder, os.O_RDONLY)
        try:
            try:
                flock(self._fd, shared=True)
            except BlockingIOError:
                raise FileNotFoundError(folder) from None
            self.damage = verify(folder, items)
            if not os.path.samestat(os.fstat(self._fd), os.stat(folder)):
                raise FileNotFoundError(folder)
            if not self.damage:
                check_format(folder)
                self.metadata = _read_descriptions(folder)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Releases the lock, so that the run may delete the checkpoint."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()

    def load(self, item: str, abstract: PyTree | None = None) -> PyTree:
        """Reads the arrays of one item, such as `params`.

        Args:
            item: One of the items for which the checkpoint was opened.
            abstract: A tree of shapes, dtypes and shardings to restore to. None: nested dicts by
                path, like Flax's parameters, on the first device.

        Raises:
            InputError: The item does not exist, or a path, shape or dtype differs from the saved
                one.
        """
        if abstract is None:
            abstract = as_abstract(self.metadata["leaves"].get(item, {}))
        return restore_items(self.folder, {item: abstract})[item]

    def digest(self) -> str:
        """The SHA-256 of the manifest without evaluation.json, which is added after the save."""
        lines = [
            f"{digest}  {name}\n"
            for name, digest in sorted(read_manifest(self.folder).items())
            if name != EVALUATION
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_checkpoint(path: str | Path, items: Collection[str] = ("params",)) -> OpenCheckpoint:
    """Opens a checkpoint.

    Args:
        path: The folder of a run, its folder `checkpoints`, or the folder of one step. Of several
            steps, the newest one is opened whose metadata and items are intact; a warning is
            logged for each newer one that is damaged.
        items: Names of the items that will be loaded; their files are verified.

    Raises:
        InputError: There is no intact checkpoint (the message suggests existing runs), a file
            cannot be read, or a newer version of jaxgpt wrote the checkpoint.
    """
    path = Path(path).expanduser()
    if is_complete(path):
        try:
            found = OpenCheckpoint(path, items)
        except FileNotFoundError:
            raise InputError(
                f"checkpoint {path} was deleted while it was being opened; use a newer step"
            ) from None
        if found.damage:
            raise InputError(
                f"checkpoint {path} is damaged: {list_some(found.damage)}; use another step"
            )
        return found
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for _ in range(TRIES):
        try:
            newest = _open_newest(folder, items)
        except FileNotFoundError:  # deleted in the meantime, so there is a newer one now
            time.sleep(0.05)
            continue
        if newest is None:
            raise _not_found(path, folder)
        return newest
    raise InputError(f"the checkpoints in {folder} are deleted before they can be read; try again")


def _open_newest(folder: Path, items: Collection[str]) -> OpenCheckpoint | None:
    """Opens the newest intact checkpoint; returns None if there are no checkpoints.

    Raises FileNotFoundError if a checkpoint is deleted in the meantime.
    """
    damaged: list[str] = []
    for step in reversed(step_folders(folder)):
        found = OpenCheckpoint(folder / str(step), items)
        if not found.damage:
            for message in damaged:
                logger.warning("checkpoint %s/%s; using an older one", folder, message)
            return found
        if not is_complete(found.folder) and (found.folder / f"{MANIFEST}.draft").exists():
            continue  # it is being saved
        damaged.append(f"{step} is damaged: {list_some(found.damage)}")
    if damaged:
        raise InputError(
            f"no checkpoint in {folder} is intact: {'; '.join(damaged)}; use another run"
        )
    return None


def _not_found(path: Path, folder: Path) -> InputError:
    """The error for a path without checkpoints, which suggests runs with similar names."""
    if folder.is_dir() and (folder != path or path.name == "checkpoints"):
        return InputError(f"{folder} has no complete checkpoint; wait until the run saves one")
    runs = [p.parent for root in {path.parent, Path("runs")} for p in root.glob("*/checkpoints")]
    near = difflib.get_close_matches(path.name, [run.name for run in runs], 3, 0.5)
    named = sorted({str(run) for run in runs if run.name in near or not near})[:5]
    return InputError(
        f"no checkpoint at {path}: looked for {path / MANIFEST} and {folder / 'STEP' / MANIFEST}; "
        + (f"{'did you mean' if near else 'there are'} {', '.join(named)}" if named else "")
        + ("?" if near else "" if named else f"there are no runs in {path.parent}")
    )


def find_checkpoint(run: Path, step: str) -> Path:
    """Finds the checkpoint of a run for `RUN@STEP` or `RUN@best`.

    Args:
        run: The run's folder.
        step: A step, or "best" for the one with the lowest validation loss.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: There is no such checkpoint, or none has a validation loss.
    """
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    steps = steps_in(folder)
    best = best_step(folder)
    if step == "best" and best is not None:
        return folder / str(best)
    if step.isdecimal() and int(step) in steps:
        return folder / str(int(step))
    listed = ", ".join(map(str, steps)) or "none"
    if step == "best":
        raise InputError(
            f"{run}@best: no checkpoint has a validation loss; use one of the steps {listed}"
        )
    raise InputError(f"{run}@{step}: no such checkpoint; use best or one of the steps {listed}")


def best_step(folder: Path) -> int | None:
    """Returns the step with the lowest validation loss in a folder of checkpoints, or None."""
    losses = {}
    for step in steps_in(folder):
        with suppress(OSError, ValueError):  # damaged, so its loss is unknown
            loss = read_measured(folder / str(step)).get("val_loss")
            if loss is not None:
                losses[step] = float(loss)
    return min(losses, key=lambda step: losses[step], default=None)


def read_metadata(path: str | Path) -> Metadata:
    """Reads a checkpoint's metadata without its arrays; see `open_checkpoint` for path and errors.

    Returns:
        The contents of the JSON files by name: `metrics` has the step and all metrics, `leaves` the
        dtype and shape of every array; the others are those passed to `Checkpoints.save`.
    """
    return open_checkpoint(path, ()).metadata


def load_params(path: str | Path, abstract: PyTree | None = None, item: str = "params") -> PyTree:
    """Reads one item of a checkpoint, by default the parameters.

    See `open_checkpoint` for `path` and errors, and `OpenCheckpoint.load` for the other arguments.
    """
    return open_checkpoint(path, (item,)).load(item, abstract)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written completely: its manifest is written last."""
    return (folder / MANIFEST).is_file()


def steps_in(folder: Path) -> list[int]:
    """Returns the steps of all complete checkpoints, ascending; does not verify their files."""
    return [step for step in step_folders(folder) if is_complete(folder / str(step))]


def step_folders(folder: Path) -> list[int]:
    """Returns the steps of all checkpoints, complete or not, ascending."""
    try:
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def verify(folder: Path, items: Collection[str] | None) -> list[str]:
    """Compares a checkpoint's files with its manifest.

    Args:
        folder: The checkpoint's folder.
        items: The items to verify in addition to the metadata; None: all.

    Returns:
        A message for each missing or changed file; empty if the checkpoint is intact.
    """

    def belongs(name: str) -> bool:
        return items is None or "/" not in name or name.split("/")[0] in items

    return find_damage(folder, belongs)


def check_format(folder: Path) -> None:
    """Raises InputError if a newer version of jaxgpt wrote the checkpoint."""
    version = _read_description(folder, "format.json").get("version", 1)
    if version > FORMAT:
        raise InputError(
            f"checkpoint {folder} has format {version}, and this version of jaxgpt supports "
            f"formats up to {FORMAT}; install a newer jaxgpt"
        )


def read_measured(folder: Path) -> Metadata:
    """Reads a checkpoint's step and all its metrics, from before and after the save."""
    return _read_description(folder, "metrics.json") | _read_description(folder, EVALUATION)


def _read_descriptions(folder: Path) -> Metadata:
    """Reads all JSON files of a checkpoint, see `read_metadata`."""
    names = [name for name in read_manifest(folder) if re.fullmatch(r"[^/]+\.json", name)]
    found = {name.removesuffix(".json"): json.loads((folder / name).read_text()) for name in names}
    found.pop("evaluation", None)
    return found | {"metrics": read_measured(folder)}


def _read_description(folder: Path, name: str) -> Metadata:
    """Reads a JSON file of a checkpoint; returns an empty dict if it is not in the manifest."""
    listed = name in read_manifest(folder)
    return json.loads((folder / name).read_text()) if listed else {}
