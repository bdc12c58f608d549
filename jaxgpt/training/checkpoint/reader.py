"""Finding and reading the checkpoints of a run, which may be training meanwhile."""

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
from jaxgpt.training.checkpoint.arrays import as_abstract, list_some, restore_items
from jaxgpt.training.lock import flock

FORMAT = 2  # of a checkpoint's layout; 1 had no format.json and no evaluation.json
EVALUATION = "evaluation.json"
TRIES = 20  # of opening a run's newest checkpoint while older ones are being deleted
logger = logging.getLogger(__name__)


class OpenCheckpoint:
    """A checkpoint that is not deleted by its run while this object exists.

    The protection is a shared `flock` on the folder; file systems without locks have none.
    """

    folder: Path
    damage: list[str]
    """What is wrong with the descriptions and the items it was opened for; empty if intact."""
    metadata: dict[str, Any]
    """If intact, what the checkpoint says of itself; see `read`."""

    def __init__(self, folder: Path, items: Collection[str] | None) -> None:
        """Opens and checks a checkpoint.

        Args:
            folder: The folder of one step.
            items: Names of the items whose files are hashed; None for all.

        Raises:
            FileNotFoundError: It was deleted, or is being deleted.
            InputError: A file cannot be read, or a newer version of jaxgpt wrote it.
        """
        self.folder = folder
        self._fd = os.open(folder, os.O_RDONLY)
        try:
            try:
                flock(self._fd, shared=True)
            except BlockingIOError:
                raise FileNotFoundError(folder) from None
            self.damage = check_items(folder, items)
            if not os.path.samestat(os.fstat(self._fd), os.stat(folder)):
                raise FileNotFoundError(folder)
            if not self.damage:
                check_format(folder)
                self.metadata = _read_descriptions(folder)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets the run delete the checkpoint."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()

    def load(self, item: str, abstract: Any = None) -> Any:
        """Reads one item's arrays, such as `params`.

        Args:
            item: One of the items that the checkpoint was opened for.
            abstract: A tree of shapes, dtypes and shardings to restore to; by default the arrays
                are nested dicts by path, as Flax's parameters are, on the first device.

        Raises:
            InputError: There is no such item, or a path, shape or dtype is not the saved one.
        """
        if abstract is None:
            abstract = as_abstract(self.metadata["leaves"].get(item, {}))
        return restore_items(self.folder, {item: abstract})[item]

    def digest(self) -> str:
        """SHA-256 of the manifest without what was measured later: it identifies the arrays."""
        lines = [
            f"{digest}  {name}\n"
            for name, digest in sorted(read_manifest(self.folder).items())
            if name != EVALUATION
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_checkpoint(path: str | Path, items: Collection[str] = ("params",)) -> OpenCheckpoint:
    """Opens the checkpoint that a path means: of a run's folder, its `checkpoints`, or one step.

    Of several steps it is the newest in which the descriptions and the named items are intact,
    with a warning for each newer one that is damaged.

    Args:
        path: A folder.
        items: Names of the items that will be loaded; their files are hashed.

    Raises:
        InputError: There is no intact checkpoint (the message lists the runs that exist), a file
            cannot be read, or a newer version of jaxgpt wrote it.
    """
    path = Path(path).expanduser()
    if is_complete(path):
        try:
            found = OpenCheckpoint(path, items)
        except FileNotFoundError:
            raise InputError(
                f"checkpoint {path} was deleted while it was opened; use a newer step"
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
        except FileNotFoundError:  # one was deleted meanwhile, so there is a newer one now
            time.sleep(0.05)
            continue
        if newest is None:
            raise _not_found(path, folder)
        return newest
    raise InputError(f"the checkpoints in {folder} change faster than they can be read; try again")


def _open_newest(folder: Path, items: Collection[str]) -> OpenCheckpoint | None:
    """None if there are no checkpoints; raises FileNotFoundError if one vanishes meanwhile."""
    damaged: list[str] = []
    for step in reversed(step_folders(folder)):
        found = OpenCheckpoint(folder / str(step), items)
        if not found.damage:
            for message in damaged:
                logger.warning("checkpoint %s/%s; an older one is used", folder, message)
            return found
        damaged.append(f"{step} is damaged: {list_some(found.damage)}")
    if damaged:
        raise InputError(f"no checkpoint in {folder} is intact: {'; '.join(damaged)}")
    return None


def _not_found(path: Path, folder: Path) -> InputError:
    if folder.is_dir() and (folder != path or path.name == "checkpoints"):
        return InputError(f"{folder} holds no complete checkpoint; let the run save one first")
    runs = [p.parent for root in {path.parent, Path("runs")} for p in root.glob("*/checkpoints")]
    near = difflib.get_close_matches(path.name, [run.name for run in runs], 3, 0.5)
    named = sorted({str(run) for run in runs if run.name in near or not near})[:5]
    return InputError(
        f"no checkpoint at {path}: looked for {path / MANIFEST} and {folder / 'STEP' / MANIFEST}; "
        + (f"{'did you mean' if near else 'there are'} {', '.join(named)}" if named else "")
        + ("?" if near else "" if named else f"there are no runs in {path.parent}")
    )


def find_step(run: Path, step: str) -> Path:
    """The folder of one checkpoint of a run, which `RUN@STEP` or `RUN@best` means.

    Args:
        run: The run's folder.
        step: A step, or "best": the one with the lowest validation loss.

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
        raise InputError(f"{run}@best: no checkpoint there has a validation loss; steps: {listed}")
    raise InputError(f"{run}@{step}: no such checkpoint; there are the steps {listed}, and best")


def best_step(folder: Path) -> int | None:
    """The step with the lowest validation loss in a folder of checkpoints, None without any."""
    losses = {}
    for step in steps_in(folder):
        with suppress(OSError, ValueError):  # damaged: not known to be the best
            loss = read_measured(folder / str(step)).get("val_loss")
            if loss is not None:
                losses[step] = float(loss)
    return min(losses, key=lambda step: losses[step], default=None)


def read(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself, by name; no array is read.

    `metrics` has the step and what was measured of it, `leaves` the dtype and shape of every
    array; the rest was given to `Checkpoints.save`. For `path` and errors see `open_checkpoint`.
    """
    return open_checkpoint(path, ()).metadata


def load_params(path: str | Path, abstract: Any = None, item: str = "params") -> Any:
    """Reads one item of a checkpoint, by default the parameters.

    For `path` and errors see `open_checkpoint`, for the rest `OpenCheckpoint.load`.
    """
    return open_checkpoint(path, (item,)).load(item, abstract)


def is_complete(folder: Path) -> bool:
    """Whether a folder has a manifest, so that all its files were written."""
    return (folder / MANIFEST).is_file()


def steps_in(folder: Path) -> list[int]:
    """The steps that have a folder with a manifest, ascending; their files are not hashed."""
    return [step for step in step_folders(folder) if is_complete(folder / str(step))]


def step_folders(folder: Path) -> list[int]:
    """The steps that have a folder, complete or not, ascending."""
    try:
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def check_items(folder: Path, items: Collection[str] | None) -> list[str]:
    """What is wrong with a checkpoint's descriptions and the files of some items, or of all."""

    def belongs(name: str) -> bool:
        return items is None or "/" not in name or name.split("/")[0] in items

    return find_damage(folder, belongs)


def check_format(folder: Path) -> None:
    """Raises InputError if a newer version of jaxgpt wrote the checkpoint."""
    version = _read_description(folder, "format.json").get("version", 1)
    if version > FORMAT:
        raise InputError(
            f"checkpoint {folder} has format {version}, and this version of jaxgpt reads formats "
            f"up to {FORMAT}; install a newer jaxgpt"
        )


def read_measured(folder: Path) -> dict[str, Any]:
    """The step and all that was measured of it, before and after it was saved."""
    return _read_description(folder, "metrics.json") | _read_description(folder, EVALUATION)


def _read_descriptions(folder: Path) -> dict[str, Any]:
    names = [name for name in read_manifest(folder) if re.fullmatch(r"[^/]+\.json", name)]
    found = {name.removesuffix(".json"): _read_description(folder, name) for name in names}
    found.pop("evaluation", None)
    return found | {"metrics": read_measured(folder)}


def _read_description(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint; empty if the manifest does not list it."""
    listed = name in read_manifest(folder)
    return json.loads((folder / name).read_text()) if listed else {}
