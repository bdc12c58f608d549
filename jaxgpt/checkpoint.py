"""Checkpoints that survive a kill, notice damage, and describe themselves.

A checkpoint is a folder named by its step:

    runs/NAME/checkpoints/500/
        params/ train/   the arrays of each top-level item of the state, written by Orbax
        config.json ...  what its writer wants to travel along
        metrics.json     the step and its validation loss
        leaves.json      the path, dtype and shape of every array
        SHA256SUMS       the hash of every file above, written last

A checkpoint exists from the moment `SHA256SUMS` does; a folder without it is a save that was cut
short. Whatever is read is hashed first, and `sha256sum -c SHA256SUMS` checks it by hand.
"""

import difflib
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt.errors import InputError, TrainingError

MANIFEST = "SHA256SUMS"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and what of it is kept."""

    every: int = 500
    """Steps between checkpoints, and one at the end; 0: only at the end."""
    keep: int = 2
    """How many of the latest checkpoints stay; older ones are deleted."""
    keep_best: bool = True
    """Whether the one with the lowest validation loss stays too."""

    def check(self) -> None:
        """Raises InputError where a field cannot be."""
        if self.every < 0:
            raise InputError(f"checkpoint.every={self.every}; set it to 0 or more")
        if self.keep < 1:
            raise InputError(f"checkpoint.keep={self.keep}; set it to 1 or more")


class Checkpoints:
    """The checkpoints of one run, for its one writer: opening it removes what a kill left behind.

    Readers of a run that may be training use `read` and `load_params`. With several processes,
    each makes the same calls on a folder they share.
    """

    def __init__(self, folder: str | Path, cfg: CheckpointConfig | None = None) -> None:
        self.folder = Path(folder).absolute()
        self.cfg = cfg or CheckpointConfig()
        self.cfg.check()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self._orbax: Any = None
        self._abandoned: set[int] = set()
        self._sweep()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending; their files are not hashed."""
        return _steps(self.folder)

    def latest(self) -> int | None:
        """The newest step whose files are as they were written, or None; a warning for each not."""
        self.wait()
        found = _newest_whole(self.folder) if jax.process_index() == 0 else None
        step = _from_first_process(-1 if found is None else int(found.name))
        self._abandon(step)
        return None if step < 0 else step

    def best(self) -> int | None:
        """The step with the lowest validation loss, or None where none was measured."""
        self.wait()
        return self._best(self.steps())

    def save(
        self,
        step: int,
        state: dict[str, Any],
        describe: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Saves a state in the background; returns once it is copied off the devices.

        Each item of `state` is a tree of arrays that can be restored without the others; each of
        `describe` is written as NAME.json; of `metrics`, `val_loss` decides what `best` is.
        A step that is already saved and undamaged is left as it is: the step determines the state.
        Raises InputError where the arguments cannot be saved or later checkpoints exist, and
        TrainingError where this or the save before it failed; the state that was saved before
        remains.
        """
        self.wait()
        later = [other for other in self.steps() if other > step and other not in self._abandoned]
        if later:
            raise InputError(
                f"step {step} cannot be saved in {self.folder}, which holds step {later[-1]}; "
                "resume from there, restore an earlier step first, or use another run name"
            )
        flat = {item: _flatten(tree, item)[0] for item, tree in state.items()}
        texts = {
            **describe,
            "metrics": {"step": step, "val_loss": None}
            | {k: float(v) if math.isfinite(v) else None for k, v in (metrics or {}).items()},
            "leaves": {
                item: {path: _spec(leaf) for path, leaf in leaves.items()}
                for item, leaves in flat.items()
            },
        }
        if len(texts) != len(describe) + 2:
            raise InputError("describe: the names `metrics` and `leaves` are taken; use others")
        files = {f"{name}.json": _to_json(name, value) for name, value in texts.items()}

        folder = self.folder / str(step)
        whole = jax.process_index() == 0 and _is_complete(folder) and not damage(folder)
        if _from_first_process(int(whole)):
            return
        import orbax.checkpoint as ocp  # here, for it takes longer to import than jax

        try:
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                _delete(folder)
                self._sweep()
            if self._orbax is None:
                self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
                logging.getLogger("absl").addFilter(_not_from_orbax)
            items = {
                item: ocp.args.PyTreeSave(_nest({k: _plain(v) for k, v in leaves.items()}))
                for item, leaves in flat.items()
                if leaves
            }
            self._orbax.save(folder, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._failure(step, error) from error
        self._saving = self._thread.submit(self._seal, step, files)

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The items of a step that `abstract` names, as its trees, on its leaves' shardings.

        Leaves of `abstract` have a shape, a dtype and maybe a sharding (none: the first device).
        Raises InputError, before any array is read, where a file is damaged or where a path,
        shape or dtype is not the saved one. Steps after this one are deleted once one is saved.
        """
        self.wait()
        folder = self.folder / str(step)
        if not _is_complete(folder):
            there = ", ".join(map(str, self.steps())) or "none"
            raise InputError(f"no checkpoint of step {step} in {self.folder}; there are: {there}")
        _check_whole(folder, abstract)
        state = _restore(folder, abstract)
        self._abandon(step)
        return state

    def wait(self) -> None:
        """Waits for the save in the background; raises TrainingError if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Waits, and frees the background threads; raises TrainingError if the save failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None
                logging.getLogger("absl").removeFilter(_not_from_orbax)

    def _abandon(self, after: int) -> None:
        """Lets the next save delete the steps after one: training goes on from there."""
        self._abandoned.update(step for step in self.steps() if step > after)

    def _seal(self, step: int, files: dict[str, str]) -> None:
        """Makes what Orbax has written a checkpoint; runs in the background."""
        folder = self.folder / str(step)
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            for name, text in files.items():
                (folder / name).write_text(text)
            manifest = "".join(f"{line}\n" for line in _hashes(folder).values())
            draft = folder / f"{MANIFEST}.draft"
            draft.write_text(manifest)
            os.replace(draft, folder / MANIFEST)
        except Exception as error:
            raise self._failure(step, error) from error
        self._prune(step)

    def _prune(self, newest: int) -> None:
        """Deletes what need not be kept: steps left behind by a resume, old ones, and scraps.

        Orbax tells of a save's first item that fails while another may still be written, and may
        come again after `_failure` has cleared it away.
        """
        self._sweep()
        until = [step for step in self.steps() if step <= newest]
        keep = {*until[-self.cfg.keep :], self._best(until) if self.cfg.keep_best else newest}
        for step in self.steps():
            if step not in keep:
                _delete(self.folder / str(step))

    def _best(self, steps: list[int]) -> int | None:
        losses = {}
        for step in steps:
            try:
                metrics = json.loads((self.folder / str(step) / "metrics.json").read_text())
            except (OSError, ValueError):
                continue
            if metrics["val_loss"] is not None:
                losses[step] = metrics["val_loss"]
        return min(losses, key=lambda step: losses[step], default=None)

    def _sweep(self) -> None:
        """Deletes the folders of saves that were cut short."""
        if jax.process_index() == 0 and self.folder.is_dir():
            complete = {str(step) for step in self.steps()}
            for child in self.folder.iterdir():
                ours = child.name.isdecimal() or ".orbax-checkpoint-tmp" in child.name
                if ours and child.name not in complete:
                    shutil.rmtree(child, ignore_errors=True)

    def _failure(self, step: int, error: Exception) -> TrainingError:
        """Clears away a save that failed and says what is left."""
        self._sweep()
        good = self.steps()
        left = f"step {good[-1]} in {self.folder} is good" if good else "there is no earlier one"
        code = re.search(r"os_error_code='(\d+)'", str(error))
        reason = os.strerror(int(code[1])) if code else str(error) or type(error).__name__
        return TrainingError(f"the checkpoint of step {step} was not saved: {reason}; {left}")


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Keeps Orbax from logging pages on an error that `save` or `wait` raises anyway."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def find(path: str | Path, items: Collection[str] = ("params",)) -> Path:
    """The checkpoint folder meant by `path`: a run's folder, its `checkpoints`, or one step.

    Of several it is the newest in which the named items and the descriptions are undamaged, with a
    warning for each newer one. Raises InputError, with the runs there are, where there is none.
    """
    path = Path(path)
    if _is_complete(path):
        _check_whole(path, items)
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = _newest_whole(folder, items)
    if found is not None:
        return found
    if _steps(folder):
        raise InputError(f"every checkpoint in {folder} is damaged: {_steps(folder)}")
    if folder.is_dir() and (folder != path or path.name == "checkpoints"):
        raise InputError(f"{folder} holds no complete checkpoint; let the run save one first")
    runs = [p.parent for root in {path.parent, Path("runs")} for p in root.glob("*/checkpoints")]
    near = difflib.get_close_matches(path.name, [run.name for run in runs], 3, 0.5)
    named = sorted({str(run) for run in runs if run.name in near or not near})[:5]
    raise InputError(
        f"no checkpoint at {path}: looked for {path / MANIFEST} and {folder / 'STEP' / MANIFEST}; "
        + (f"{'did you mean' if near else 'there are'} {', '.join(named)}" if named else "")
        + ("?" if near else "" if named else f"there are no runs in {path.parent}")
    )


def read(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself, by name: `metrics`, `leaves` and all of `describe`.

    For `path` see `find`; no array is read. Raises InputError.
    """
    folder = find(path, ())
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def load_params(path: str | Path, abstract: Any = None, item: str = "params") -> Any:
    """The parameters alone, anywhere, or another item: nothing else of the checkpoint is read.

    For `path` see `find`. Without `abstract` they are nested dicts by path, as Flax's parameters
    are, on the first device; with it they take its tree and shardings, and InputError is raised
    where a path, shape or dtype is not the saved one.
    """
    folder = find(path, (item,))
    if abstract is None:
        leaves = json.loads((folder / "leaves.json").read_text())
        abstract = as_abstract(leaves.get(item, {}))
    return _restore(folder, {item: abstract})[item]


def as_abstract(leaves: dict[str, str]) -> dict[str, Any]:
    """An item of `leaves`, as `read` gives it, as nested dicts of `ShapeDtypeStruct`s."""
    return _nest({path: _parse(spec) for path, spec in leaves.items()})


def digest(path: str | Path) -> str:
    """SHA-256 of a checkpoint's manifest: the same for as long as no file of it changes."""
    return hashlib.sha256((find(path) / MANIFEST).read_bytes()).hexdigest()


def damage(folder: Path, items: Collection[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint's files, as `train/d/1b9f: changed`; empty if nothing.

    All files are hashed, or those of the named items and the descriptions.
    """
    try:
        lines = (folder / MANIFEST).read_text(errors="replace").split("\n")[:-1]
        found = _hashes(folder, items)
    except OSError as error:
        return [f"unreadable: {error}"]
    listed = {line[66:]: line for line in lines if _within(line[66:], items)}
    wrong = sorted(name for name in listed.keys() | found if listed.get(name) != found.get(name))
    return [
        f"{name}: {'missing' if name not in found else 'changed' if name in listed else 'unlisted'}"
        for name in wrong
    ]


def _hashes(folder: Path, items: Collection[str] | None = None) -> dict[str, str]:
    """The manifest's line for every file, by name, in the format of `sha256sum`."""
    lines = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != MANIFEST and _within(name, items):
            with file.open("rb") as stream:
                lines[name] = f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {name}"
    return lines


def _within(name: str, items: Collection[str] | None) -> bool:
    return items is None or "/" not in name or name.split("/")[0] in items


def _is_complete(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and _is_complete(p))


def _newest_whole(folder: Path, items: Collection[str] | None = None) -> Path | None:
    for step in reversed(_steps(folder)):
        found = damage(folder / str(step), items)
        if not found:
            return folder / str(step)
        logger.warning("checkpoint %s/%d is damaged, passed over: %s", folder, step, _some(found))
    return None


def _check_whole(folder: Path, items: Collection[str]) -> None:
    found = damage(folder, items)
    if found:
        raise InputError(f"checkpoint {folder} is damaged: {_some(found)}; use another step")


def _some(messages: list[str]) -> str:
    more = f"; and {len(messages) - 8} more" if len(messages) > 8 else ""
    return "; ".join(messages[:8]) + more


def _delete(folder: Path) -> None:
    """Deletes a checkpoint, its validity first."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _from_first_process(value: int) -> int:
    """Process 0's value, on every process: they must take the same branch."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _to_json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"describe[{name!r}] cannot be written as JSON: {error}") from None


def _flatten(tree: Any, item: str) -> tuple[dict[str, Any], Any]:
    """Leaves by path, as `blocks/0/q/w`, and the tree's structure.

    Orbax names the arrays `blocks.0.q.w`, so two paths that differ only there would be one.
    """
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in entries
    }
    if len({path.replace("/", ".") for path in leaves}) < len(entries):
        raise InputError(f"{item}: two leaves have the same path but for `/` and `.`; rename one")
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise InputError(f"{item}/{path} is a {type(leaf).__name__}; make it an array")
    return leaves, treedef


def _nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts: `{"a/b": x}` becomes `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _spec(leaf: Any) -> str:
    """A leaf's dtype and shape, as `float32[64,64]`; `_parse` is the inverse."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _parse(spec: str) -> jax.ShapeDtypeStruct:
    name, _, lengths = spec.rstrip("]").partition("[")
    shape = tuple(int(n) for n in lengths.split(",") if n)
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        key = jax.eval_shape(partial(jax.random.key, 0, impl=impl))
        if name == str(key.dtype):
            return jax.ShapeDtypeStruct(shape, key.dtype)
    return jax.ShapeDtypeStruct(shape, np.dtype(name))


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    """A typed key as its numbers; any other array as it is."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _restore(folder: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """The items of an undamaged checkpoint as trees like `abstract`."""
    import orbax.checkpoint as ocp

    saved = json.loads((folder / "leaves.json").read_text())
    wanted, wrong = {}, []
    for item, tree in abstract.items():
        if item not in saved:
            raise InputError(f"checkpoint {folder} has no {item!r}; it has {', '.join(saved)}")
        leaves, treedef = wanted[item] = _flatten(tree, item)
        have, want = saved[item], {path: _spec(leaf) for path, leaf in leaves.items()}
        wrong += [
            f"{item}/{path}: saved {have.get(path, 'nothing')}, wanted {want.get(path, 'nothing')}"
            for path in sorted(have.keys() | want.keys())
            if have.get(path) != want.get(path)
        ]
    if wrong:
        raise InputError(
            f"checkpoint {folder} does not fit: {_some(wrong)}; set the config it was saved with"
        )

    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    restored = {}
    for item, (leaves, treedef) in wanted.items():
        plain = {
            path: jax.eval_shape(_plain, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            for path, leaf in leaves.items()
        }
        args = {
            path: ocp.ArrayRestoreArgs(
                sharding=getattr(leaves[path], "sharding", None) or device,
                global_shape=leaf.shape,
                dtype=leaf.dtype,
            )
            for path, leaf in plain.items()
        }
        arrays: dict[str, Any] = {}
        if leaves:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
                tree = orbax.restore(
                    folder.absolute() / item,
                    args=ocp.args.PyTreeRestore(item=_nest(plain), restore_args=_nest(args)),
                )
            arrays = _flatten(tree, item)[0]
        restored[item] = jax.tree.unflatten(
            treedef, [_typed(arrays[path], leaf) for path, leaf in leaves.items()]
        )
    return restored


def _typed(array: jax.Array, leaf: Any) -> jax.Array:
    """The inverse of `_plain`: numbers become a key again where `leaf` is one."""
    if not _is_key(leaf):
        return array
    impl: list[Any] = []
    jax.eval_shape(
        lambda key: impl.append(jax.random.key_impl(key)),
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
    )
    return jax.random.wrap_key_data(array, impl=impl[0])
