"""Writes the checkpoints of a run, finds the one to resume from, and deletes old ones."""

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import Annotated, Any, ParamSpec

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt.bounds import Ge, check_bounds
from jaxgpt.errors import InputError, TrainingError
from jaxgpt.manifest import MANIFEST, add_to_manifest, find_damage, write_manifest
from jaxgpt.paths import expand
from jaxgpt.sharding import PyTree
from jaxgpt.training.checkpoint.arrays import (
    as_numbers,
    at_once,
    flatten_leaves,
    format_spec,
    list_some,
    nest_leaves,
    restore_items,
)
from jaxgpt.training.checkpoint.reader import (
    EVALUATION,
    FORMAT,
    best_step,
    check_format,
    is_complete,
    step_folders,
    steps_in,
    verify,
)
from jaxgpt.training.lock import flock

Args = ParamSpec("Args")
RESERVED = {"format", "metrics", "leaves", "evaluation"}
UNFINISHED = re.compile(r"\d+(\.saving|(\.saving)?\.orbax-checkpoint-tmp.*)")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save checkpoints and how many to keep."""

    every: Annotated[int, Ge(0)] = 500
    """Steps between checkpoints. The last step is always saved; 0: no others by their number."""
    minutes: Annotated[float, Ge(0)] = 10.0
    """Minutes after which a checkpoint is saved, if none was saved since by `every`: the most work
    that a killed run loses. With several processes the time is looked at when they log. 0: no
    checkpoints by time."""
    keep: Annotated[int, Ge(1)] = 2
    """The number of newest checkpoints to keep; older ones are deleted."""
    keep_best: bool = True
    """Whether to also keep the checkpoint with the lowest validation loss."""
    patience: Annotated[float, Ge(0)] = 10.0
    """Minutes for which training waits and retries if a checkpoint cannot be saved, for example
    because the disk is full or not mounted. Then the run ends with an error. The same holds at the
    end of a run that is copied to a bucket or a mount."""
    local: str = ""
    """A folder on a local disk in which the run is trained, while a thread copies it to `runs`. It
    is for a `runs` on a slow or unreliable mount, such as Google Drive in Colab. Empty: training
    writes to `runs` itself, or, if that is a URL, to a folder in the cache."""

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        check_bounds(self, "checkpoint.")
        expand(self.local)  # raises for a URL


class Checkpoints:
    """The checkpoints of one run, for the process or processes that train it.

    The caller must hold the run's lock (`lock.RunLock`), because the constructor deletes unfinished
    saves of an earlier process. With several processes, all make the same calls on a shared folder.
    """

    def __init__(self, folder: str | Path, cfg: CheckpointConfig | None = None) -> None:
        self.folder = Path(folder).absolute()
        self.cfg = cfg or CheckpointConfig()
        self.cfg.check()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self._orbax: Any = None
        self._intact: set[int] = set()
        self._made: tuple[int, int] | None = None  # the folder's identity since the first save
        self.sweep()

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, ascending; does not verify their files."""
        return steps_in(self.folder)

    def latest(self) -> int | None:
        """Returns the newest step whose files are intact, or None if there are no checkpoints.

        Damaged newer checkpoints are renamed to `STEP.damaged`, with a warning.

        Raises:
            InputError: There are checkpoints but none is intact, or a file cannot be read.
        """
        return self._resume_from(step_folders(self.folder), "damaged")

    def go_back(self, step: int) -> None:
        """Makes an earlier step the latest one by renaming later ones to `STEP.abandoned`.

        Raises:
            InputError: There is no checkpoint of this step, or it is damaged.
        """
        if step not in self.steps():
            raise InputError(f"resume={step}: there is no such checkpoint; {self._list()}")
        self._resume_from([step], "abandoned")

    def best(self) -> int | None:
        """Returns the step with the lowest validation loss, or None if none was measured."""
        self.wait()
        return best_step(self.folder)

    def save(
        self,
        step: int,
        state: Mapping[str, PyTree],
        describe: Mapping[str, object],
        metrics: dict[str, float] | None = None,
        recreate: bool = False,
    ) -> None:
        """Saves a state in the background; returns when it is copied from the devices.

        A step that is already saved and intact is not written again, because training is
        deterministic.

        Args:
            step: The number of training steps that are done.
            state: Trees of arrays by item; each item can be restored without the others.
            describe: Metadata by name; each value is written to NAME.json.
            metrics: Numbers to store with the step; NaN and infinities become null.
            recreate: Whether to create the folder again if it has disappeared since the last save,
                instead of raising TrainingError.

        Raises:
            InputError: The arguments cannot be stored, or later checkpoints exist.
            TrainingError: This save or the previous one failed. Earlier checkpoints remain.
        """
        self.wait()
        if later := [other for other in self.steps() if other > step]:
            raise InputError(
                f"step {step} cannot be saved in {self.folder}, which has the later step "
                f"{later[-1]}; resume from that, go back with --resume, or use another run name"
            )
        if reserved := RESERVED & describe.keys():
            raise InputError(
                f"describe: the names {', '.join(sorted(reserved))} are reserved; use other names"
            )
        flat = {item: flatten_leaves(tree, item)[0] for item, tree in state.items()}
        texts = {
            **describe,
            "format": {"version": FORMAT},
            "metrics": {"step": step, "val_loss": None} | _finite(metrics or {}),
            "leaves": {
                item: {path: format_spec(leaf) for path, leaf in leaves.items()}
                for item, leaves in flat.items()
            },
        }
        files = {f"{name}.json": _to_json(name, value) for name, value in texts.items()}

        import orbax.checkpoint as ocp  # imported here because it takes longer than jax

        folder, first = self.folder / str(step), jax.process_index() == 0
        try:
            intact = first and is_complete(folder) and not find_damage(folder)
            if _from_first_process(int(intact)):
                return
            if first:
                if self._made is None or recreate:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._made = _identity(self.folder)
                self._check_folder()
                if folder.exists():
                    set_aside(folder, "damaged")
                self.sweep()
                needed = _bytes_on_disk(flat)
                free = shutil.disk_usage(self.folder).free
                if free < needed:  # checked first, because Orbax fails with pages of tracebacks
                    raise OSError(
                        errno.ENOSPC,
                        f"{os.strerror(errno.ENOSPC)} ({needed:,} bytes needed, {free:,} free)",
                    )
            if self._orbax is None:
                # Compressed, float32 takes 8% less of the disk, and another copy in memory.
                handlers = {
                    item: ocp.PyTreeCheckpointHandler(
                        use_compression=False, save_concurrent_gb=at_once(leaves)
                    )
                    for item, leaves in flat.items()
                }
                self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
                logging.getLogger("absl").addFilter(_not_from_orbax)
                _hide_errors_of_orbax()
            items = {
                item: ocp.args.PyTreeSave(
                    nest_leaves({path: as_numbers(leaf) for path, leaf in leaves.items()})
                )
                for item, leaves in flat.items()
                if leaves
            }
            self._orbax.save(_draft(folder), args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._failure(step, error) from error
        self._saving = self._thread.submit(self._finish, step, files)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Adds metrics that were measured after a step was saved, such as `val_loss`.

        They are written in the background, after the save.
        """
        self._saving = self._thread.submit(self._record, step, metrics, self._saving)

    def failure(self) -> TrainingError | None:
        """Returns the error of the background save if it has failed, or None; does not wait."""
        if self._saving is None or not self._saving.done():
            return None
        try:
            self.wait()
        except TrainingError as error:
            return error
        return None

    def restore(self, step: int, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Reads items of a step.

        Args:
            step: One of `steps()`.
            abstract: By item, trees whose leaves have a shape, a dtype and optionally a sharding;
                the default is the first device.

        Returns:
            The items as trees like those of `abstract`, with its shardings.

        Raises:
            InputError: A file is damaged, or a path, shape or dtype differs from the saved one.
                This is checked before any array is read.
        """
        self.wait()
        folder = self.folder / str(step)
        if not is_complete(folder):
            raise InputError(f"no checkpoint of step {step}; {self._list()}")
        if step not in self._intact:
            if found := verify(folder, abstract):
                raise InputError(
                    f"checkpoint {folder} is damaged: {list_some(found)}; use another step"
                )
            check_format(folder)
        return restore_items(folder, abstract)

    def sweep(self) -> None:
        """Deletes the files of saves that were killed or failed.

        If the run's folder has disappeared, for example because its disk was unmounted, Orbax
        creates it again; such empty folders are deleted too, because they would block the mount.
        """
        if jax.process_index() == 0 and self.folder.is_dir():
            for child in self.folder.iterdir():
                if UNFINISHED.fullmatch(child.name):
                    shutil.rmtree(child, ignore_errors=True)
            if self._made is not None and _identity(self.folder) != self._made:
                with contextlib.suppress(OSError):  # not empty
                    self.folder.rmdir()
                    self.folder.parent.rmdir()

    def wait(self) -> None:
        """Waits for the save in the background; raises TrainingError if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Waits and stops the background threads; raises TrainingError if the save failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._orbax is not None:
                with contextlib.suppress(Exception):  # `wait` has already raised it
                    self._orbax.close()
                self._orbax = None
                logging.getLogger("absl").removeFilter(_not_from_orbax)

    def _resume_from(self, steps: list[int], why: str) -> int | None:
        """Returns the newest intact one of `steps`, the same on every process.

        Later checkpoints are renamed to STEP.WHY.
        """
        self.wait()
        chosen, failed = -1, None
        if jax.process_index() == 0:
            try:
                chosen = self._newest_intact(steps, why)
            except InputError as error:
                chosen, failed = -2, error
        chosen = _from_first_process(chosen)
        if chosen == -2:
            raise failed or InputError(
                f"process 0 cannot use the checkpoints in {self.folder}; see its error message"
            )
        self._intact.add(chosen)
        return None if chosen < 0 else chosen

    def _newest_intact(self, steps: list[int], why: str) -> int:
        """Returns the newest intact one of `steps`, or -1 if `steps` is empty."""
        wrong: dict[int, str] = {}
        for step in reversed(steps):
            folder = self.folder / str(step)
            if found := find_damage(folder):
                wrong[step] = list_some(found)
                continue
            check_format(folder)
            for later in [other for other in step_folders(self.folder) if other > step]:
                moved = set_aside(self.folder / str(later), why)
                reason = f" ({wrong[later]})" if later in wrong else ""
                logger.warning(
                    "checkpoint %s/%d is %s%s; renamed it to %s",
                    *(self.folder, later, why, reason, moved),
                )
            return step
        if wrong:
            listed = "; ".join(f"step {step}: {found}" for step, found in wrong.items())
            raise InputError(
                f"no checkpoint in {self.folder} is intact; nothing was changed. {listed}. "
                "Restore the files from a backup, or, to train again from step 0, rename that "
                "folder or use another run name"
            )
        return -1

    def _finish(self, step: int, files: dict[str, str]) -> None:
        """Adds metadata and manifest to what Orbax has written, and renames the folder.

        Runs in the background thread.
        """
        folder = self.folder / str(step)
        draft = _draft(folder)
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            for name, text in files.items():
                (draft / name).write_text(text)
            write_manifest(draft)
            self._check_folder()  # Orbax creates the folder again if it has disappeared
            # A mounted bucket (gcsfuse) renames a folder file by file, so the manifest comes last.
            unlisted = (draft / MANIFEST).rename(draft / f"{MANIFEST}.draft").name
            draft.rename(folder)
            (folder / unlisted).rename(folder / MANIFEST)
        except Exception as error:
            raise self._failure(step, error) from error
        self._prune()

    def _record(self, step: int, metrics: dict[str, float], saving: Future[None] | None) -> None:
        """Writes evaluation.json after the save `saving`; runs in the background thread."""
        if saving is not None:
            saving.result()
        folder = self.folder / str(step)
        if jax.process_index() != 0 or not is_complete(folder):
            return
        try:
            # The file is complete before the manifest lists it; until then readers ignore it.
            draft = folder / f"{EVALUATION}.draft"
            draft.write_text(_to_json("evaluation", _finite(metrics)))
            draft.replace(folder / EVALUATION)
            add_to_manifest(folder, EVALUATION)
        except OSError as error:
            logger.warning(
                "the metrics of step %d were not added to its checkpoint: %s", step, error.strerror
            )
        self._prune()

    def _prune(self) -> None:
        """Deletes old checkpoints and the files of failed saves.

        Orbax reports a failure while other items of the save may still be being written, so a
        failed save can leave files even after `_failure` has removed them.
        """
        try:
            self.sweep()
            steps = self.steps()
            best = best_step(self.folder) if self.cfg.keep_best else None
            keep = {*steps[-self.cfg.keep :], best}
            for step in steps:
                folder = self.folder / str(step)
                # If its metrics are damaged, it may be the best one, so it is not deleted.
                if step not in keep and (found := verify(folder, ())):
                    moved, reason = set_aside(folder, "damaged"), list_some(found)
                    logger.warning(
                        "checkpoint %s is damaged (%s); renamed it to %s", folder, reason, moved
                    )
                elif step not in keep:
                    delete_checkpoint(folder)
        except (OSError, InputError) as error:
            logger.warning("old checkpoints in %s could not be deleted: %s", self.folder, error)

    def _check_folder(self) -> None:
        """Raises OSError if the folder was removed or replaced since the first save."""
        if _identity(self.folder) != self._made:
            raise FileNotFoundError(errno.ENOENT, f"{self.folder} has disappeared")

    def _failure(self, step: int, error: Exception) -> TrainingError:
        """Removes a failed save's files; returns an error that names the last good checkpoint."""
        self.sweep()
        good = self.steps()
        left = (
            f"the last checkpoint is step {good[-1]} in {self.folder}"
            if good
            else "there is no earlier checkpoint"
        )
        code = re.search(r"os_error_code='(\d+)'", str(error))
        reason = os.strerror(int(code[1])) if code else _reason(error)
        return TrainingError(f"the checkpoint of step {step} was not saved: {reason}; {left}")

    def _list(self) -> str:
        return f"{self.folder} has: {', '.join(map(str, self.steps())) or 'none'}"


def _identity(folder: Path) -> tuple[int, int] | None:
    """The device and inode of a folder, to notice if it is replaced; None if there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _draft(folder: Path) -> Path:
    """The folder in which a checkpoint is written before it is renamed."""
    return folder.with_name(f"{folder.name}.saving")


def set_aside(folder: Path, why: str) -> str:
    """Renames a checkpoint to STEP.WHY, or STEP.WHY-2 and so on; returns the new name."""
    names = (f"{folder.name}.{why}{'' if n == 1 else f'-{n}'}" for n in count(1))
    name = next(name for name in names if not folder.with_name(name).exists())
    folder.rename(folder.with_name(name))
    return name


def delete_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint, its manifest first, unless another process has it open."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        flock(fd)
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except BlockingIOError:
        pass  # in use; the next save tries again
    finally:
        os.close(fd)


def _from_first_process(value: int) -> int:
    """Returns process 0's value on every process, so that all take the same branch."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _bytes_on_disk(items: dict[str, dict[str, jax.Array]]) -> int:
    """An upper estimate of the size of a checkpoint of these arrays."""
    leaves = [leaf for item in items.values() for leaf in item.values()]
    return int(1.05 * sum(leaf.nbytes for leaf in leaves)) + 8192 * len(leaves) + (1 << 18)


def _hide_errors_of_orbax() -> None:
    """Installs exception hooks that hide the tracebacks of Orbax's threads.

    They are redundant: `save` and `wait` raise the first error of a failed save.
    """

    def hide(
        inner: Callable[Args, object], is_known: Callable[Args, bool]
    ) -> Callable[Args, object]:
        if getattr(inner, "hides_orbax", False):
            return inner

        def hook(*args: Args.args, **kwargs: Args.kwargs) -> None:
            if not is_known(*args, **kwargs):
                inner(*args, **kwargs)

        hook.hides_orbax = True  # type: ignore[attr-defined]
        return hook

    def is_in(traceback: TracebackType | None, *parts: str) -> bool:
        files = [frame.f_code.co_filename for frame, _ in walk_tb(traceback)]
        return any(part in file for file in files for part in parts)

    # Exceptions in the threads that write, and in callbacks to their closed event loops.
    threading.excepthook = hide(
        threading.excepthook, lambda args: is_in(args.exc_traceback, "/orbax/")
    )
    sys.excepthook = hide(
        sys.excepthook,
        lambda kind, _, where: kind is RuntimeError and is_in(where, "/asyncio/", "/orbax/"),
    )


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """A log filter that drops Orbax's long error logs, because `save` or `wait` raise the error."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _finite(metrics: dict[str, float]) -> dict[str, float | None]:
    return {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}


def _to_json(name: str, value: object) -> str:
    try:
        return json.dumps(value, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(
            f"describe[{name!r}] is not valid JSON: {error}; use finite numbers, strings, lists "
            "and dicts"
        ) from None
