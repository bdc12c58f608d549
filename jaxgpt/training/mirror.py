"""Keeps a run in a bucket or on a mount, while it is trained in a local folder.

    with Mirror(cfg) as mirror:      # takes the lease, and downloads the run if it is newer there
        mirror.begin(step)           # after it is known from which step training resumes
        ...                          # a thread copies what is new: no step waits for it
                                     # at the end of the block everything is copied

Checkpoints are compared by how often their run went back to an earlier one (--resume), and then by
their step: the newer one wins. The lease is a file in the bucket that names the process which
trains the run and is written again and again. A lease that does not change has expired.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from jaxgpt import config
from jaxgpt.errors import InputError, TrainingError
from jaxgpt.manifest import MANIFEST
from jaxgpt.store import ANSWER_SECONDS, Store
from jaxgpt.training import checkpoint
from jaxgpt.training.checkpoint import steps_in
from jaxgpt.training.checkpoint.arrays import list_some
from jaxgpt.training.checkpoint.remote import FOLDER, complete_steps, download_files, partial_steps
from jaxgpt.training.checkpoint.writer import set_aside

LEASE = "lease.json"
"""The lease in the bucket; in the local folder, what identifies its owner."""
NOT_COPIED = {"lock", LEASE}
POLL_SECONDS = 1.0  # between looks at the local folder for new checkpoints
FILES_SECONDS = 60.0  # between copies of other files that have changed, such as metrics.jsonl
RETRY_SECONDS = 10.0  # between tries to copy
REFRESH_SECONDS = 20.0  # between writes of the lease
EXPIRES_SECONDS = 70.0  # without a write, after which a lease has expired
OLD_SECONDS = 900.0  # age at which a lease has expired, even if the two clocks differ

Stamp = tuple[int, int]  # size and time of the last change of a file


def has_begun(cfg: config.Config) -> bool:
    """Whether a run has a checkpoint, in its folder or at its place."""
    if steps_in(cfg.folder / FOLDER):
        return True
    return cfg.is_copied and bool(checkpoint.Remote(Store(cfg.place)).steps())


def copy_report(cfg: config.Config) -> None:
    """Copies the report beside a run's folder to where its runs are kept; raises InputError."""
    folder, store = cfg.folder.parent, Store(cfg.runs)
    for file in (*folder.glob("report.*"), *folder.glob("report/*")):
        store.write(file.relative_to(folder).as_posix(), file.read_bytes())


class Mirror:
    """Copies a run's folder to its place; a context manager.

    The caller must hold the lock on the local folder.

    Raises:
        InputError: On entering it: the place cannot be written or read, another process trains the
            run there, or none of its checkpoints is intact.
    """

    def __init__(self, cfg: config.Config) -> None:
        self._cfg, self._folder = cfg, cfg.folder
        self._store = Store(cfg.place)
        self._remote = checkpoint.Remote(self._store)
        self._damaged: set[int] = set()  # steps that are damaged at the place
        self._stamps: dict[str, Stamp | None] = {}  # what has been copied, by name
        self._files_at = 0.0
        self._lost = ""  # the process that has taken the lease over
        self._failing = False
        self._error: Exception | None = None
        self._ending, self._ended = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Mirror":
        self._take_lease()
        try:
            pull(self._cfg, self._store, self._damaged)
        except BaseException:
            self._drop_lease()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Waits until everything is copied.

        Raises TrainingError if that has failed for `checkpoint.patience` minutes, unless the block
        has raised an error, which is more important.
        """
        self._ending.set()
        try:
            if self._threads:
                self._wait()
        except TrainingError as error:
            if kind is None:
                raise
            self._warn(str(error))
        finally:
            self._ended.set()
            for thread in self._threads:  # one that still writes the lease would bring it back
                thread.join(ANSWER_SECONDS)
            self._drop_lease()

    def begin(self, start: int) -> None:
        """Starts to copy, after training has found the step from which it resumes.

        Later checkpoints at the place are renamed to STEP.damaged or STEP.abandoned.
        """
        for step in self._remote.steps():
            if step > start:
                why = "damaged" if step in self._damaged else "abandoned"
                moved = self._remote.set_aside(step, why)
                self._warn(f"checkpoint {self._cfg.place}/checkpoints/{step} is {why}: {moved} now")
        print(f"the run is copied to {self._cfg.place} in the background", flush=True)
        for work in (self._copy_until_end, self._keep_lease):
            thread = threading.Thread(target=work, name="mirror", daemon=True)
            thread.start()
            self._threads.append(thread)

    def check(self) -> None:
        """Raises TrainingError if another process trains the run at its place now."""
        if self._lost:
            raise TrainingError(
                f"{self._cfg.place} is now trained by {self._lost}, so this process ends and "
                f"copies nothing more; its own checkpoints are in {self._folder}"
            )

    def _wait(self) -> None:
        copying = self._threads[0]
        copying.join(1.0)
        if copying.is_alive():
            print(
                f"waiting until the run is copied to {self._cfg.place}; Ctrl-C ends that, and the "
                "same command continues it",
                flush=True,
            )
        while copying.is_alive():
            copying.join(0.2)
        self.check()
        if self._error is not None:
            raise TrainingError(
                f"the run is not copied completely to {self._cfg.place}: {self._error}. It is "
                f"whole in {self._folder}; the same command on this machine copies it"
            )

    # Copying

    def _copy_until_end(self) -> None:
        patience = 60 * self._cfg.checkpoint.patience
        began = 0.0  # when the end of the run was first seen
        while True:
            ending = self._ending.is_set()
            began = began or (time.monotonic() if ending else 0.0)
            try:
                if not self._lost:
                    self._copy(ending)
            except Exception as error:  # whatever it is, it must not end the thread
                since = max(began, self._store.sent_at)
                if ending and time.monotonic() - since >= patience:
                    self._error = error
                    return
                if not self._failing:
                    self._warn(f"{error}; training goes on, and the copy is tried again")
                self._failing = True
                pause = RETRY_SECONDS
            else:
                if self._failing:
                    self._warn(f"the run is copied to {self._cfg.place} again")
                self._failing = False
                if ending:
                    return
                pause = POLL_SECONDS
            if ending:
                time.sleep(pause)
            else:
                self._ending.wait(pause)

    def _copy(self, everything: bool) -> None:
        """Copies what has changed since the last call."""
        if everything or time.monotonic() - self._files_at > FILES_SECONDS:
            self._copy_files()
        tried: set[str] = set()
        while (new := self._changed_steps()).keys() - tried and not self._lost:
            name = max(new.keys() - tried, key=int)  # the newest one counts most
            tried.add(name)
            self._copy_files()  # a checkpoint never comes before the metrics up to its step
            with contextlib.suppress(FileNotFoundError):  # deleted in the meantime
                self._remote.upload(self._folder / FOLDER / name)
                self._stamps[name] = new[name]
            self._prune()

    def _changed_steps(self) -> dict[str, Stamp]:
        """The checkpoints that are new or got an evaluation since they were copied."""
        root = self._folder / FOLDER
        stamps = {name: _stamp(root / name / MANIFEST) for name in map(str, steps_in(root))}
        return {name: at for name, at in stamps.items() if at and at != self._stamps.get(name)}

    def _copy_files(self) -> None:
        """Copies the files outside of checkpoints that have changed."""
        for top, folders, files in os.walk(self._folder):
            if Path(top) == self._folder and FOLDER in folders:
                folders.remove(FOLDER)
            for file in (Path(top) / name for name in files):
                name, stamp = file.relative_to(self._folder).as_posix(), _stamp(file)
                if name in NOT_COPIED or stamp == self._stamps.get(name) or not file.is_file():
                    continue
                with contextlib.suppress(FileNotFoundError):
                    self._store.write(name, file.read_bytes())
                    self._stamps[name] = stamp
        self._files_at = time.monotonic()

    def _prune(self) -> None:
        """Deletes old checkpoints at the place, by the same rule as in the local folder."""
        files = self._store.files(FOLDER)
        steps, partial = complete_steps(files), partial_steps(files)
        cfg = self._cfg.checkpoint
        keep: set[int | None] = {*steps[-cfg.keep :]}
        if cfg.keep_best and len(steps) > cfg.keep:
            keep.add(self._remote.best(steps))
        here = steps_in(self._folder / FOLDER)
        for step in {*steps} - keep | {*partial} - {*here}:
            self._remote.delete(step)

    # The lease

    def _take_lease(self) -> None:
        """Writes the lease, which also shows that the place can be written and read."""
        own = _read_json((self._folder / LEASE).read_bytes) if _stamp(self._folder / LEASE) else {}
        host = socket.gethostname()
        known = own.get("id") if own.get("host") == host else None
        self._id = str(known or uuid.uuid4().hex)
        self._refuse_other()
        mine = {"id": self._id, "host": host, "pid": os.getpid()}
        self._lease = mine
        self._write_lease()
        if self._read_lease().get("id") != self._id:
            raise InputError(
                f"{self._cfg.place} does not return what was just written to it: the store may be "
                "slow to show changes, or another process trains the run; check that, and try again"
            )
        (self._folder / LEASE).write_text(json.dumps(mine) + "\n")

    def _refuse_other(self) -> None:
        """Raises InputError if another process holds the lease and writes it."""
        found = self._read_lease()
        written = found.get("time")
        age = time.time() - written if isinstance(written, int | float) else 0.0
        if not found or found.get("id") == self._id or abs(age) > OLD_SECONDS:
            return
        who = _holder(found)
        print(
            f"{self._cfg.place} was trained by {who} {max(age, 0):.0f} s ago; waiting for up to "
            f"{EXPIRES_SECONDS:g} s to see whether it still is",
            flush=True,
        )
        deadline = time.monotonic() + EXPIRES_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(5.0, EXPIRES_SECONDS / 4))
            now = self._read_lease()
            if not now:
                return
            if now != found:
                raise InputError(
                    f"{self._cfg.place} is being trained by {_holder(now)}; wait for it, stop it, "
                    "or use another run name"
                )

    def _keep_lease(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            with contextlib.suppress(InputError):  # the copy reports that the place is gone
                found = self._read_lease()
                if found and found.get("id") != self._id:
                    self._lost = _holder(found)
                    return
                self._write_lease()

    def _write_lease(self) -> None:
        content = json.dumps({**self._lease, "time": round(time.time(), 3)})
        self._store.write(LEASE, content.encode() + b"\n")

    def _read_lease(self) -> dict[str, Any]:
        return _read_json(lambda: self._store.read(LEASE))

    def _drop_lease(self) -> None:
        with contextlib.suppress(Exception):  # it expires
            if self._read_lease().get("id") == self._id:
                self._store.remove([LEASE])

    def _warn(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # stderr is closed
            print(f"warning: {text}", file=sys.stderr, flush=True)


def pull(cfg: config.Config, store: Store, damaged: set[int]) -> None:
    """Downloads a run from its place if that has a newer checkpoint than the local folder.

    Args:
        cfg: The run's config.
        store: The place.
        damaged: A set to which the steps are added that are damaged at the place.

    Raises:
        InputError: The place cannot be read, or it has checkpoints and none is intact anywhere.
    """
    remote, root = checkpoint.Remote(store), cfg.folder / FOLDER
    files = store.files()
    steps, local = complete_steps(files), _newest_local(root)
    wrong: dict[int, str] = {}
    newer = None  # the step that is downloaded
    for step in reversed(steps):
        lineage = _read_json(lambda s=step: store.read(f"{FOLDER}/{s}/lineage.json"))
        if local is not None and local >= (_went_back(lineage), step):
            break
        here = f", which has step {local[1]}" if local else ""
        print(f"downloading step {step} of {cfg.place} to {cfg.folder}{here}", flush=True)
        draft = root / f"{step}.saving"
        try:
            found = remote.download(step, draft)
        except FileNotFoundError:  # deleted in the meantime
            continue
        if found:
            wrong[step] = list_some(found)
            print(f"warning: it is damaged: {wrong[step]}", file=sys.stderr, flush=True)
            continue
        for later in checkpoint.step_folders(root):
            if later >= step:
                set_aside(root / str(later), "damaged" if later == step else "abandoned")
        draft.rename(root / str(step))
        others = [n for n in files if n not in NOT_COPIED and not n.startswith(f"{FOLDER}/")]
        download_files(store, cfg.folder, others)
        newer = step
        break
    damaged.update(wrong)
    if newer is None and local is None and wrong:
        listed = "; ".join(f"step {step}: {found}" for step, found in wrong.items())
        raise InputError(
            f"no checkpoint in {cfg.place} is intact; nothing was changed there. {listed}. Use "
            "another run name, or delete that run to train it again"
        )
    if newer is None and local is not None and local[1] not in steps[-1:]:
        there = f"step {steps[-1]}" if steps else "none"
        print(
            f"{cfg.folder} has step {local[1]}, and {cfg.place} {there}: training resumes from the "
            "folder, and copies it",
            flush=True,
        )
    if cfg.resume in steps and cfg.resume not in steps_in(root):
        draft = root / f"{cfg.resume}.saving"
        if found := remote.download(cfg.resume, draft):
            raise InputError(
                f"resume={cfg.resume} is damaged in {cfg.place}: {list_some(found)}; use another "
                "step"
            )
        draft.rename(root / str(cfg.resume))


def _newest_local(root: Path) -> tuple[int, int] | None:
    """How often the newest intact checkpoint in a folder went back, and its step."""
    for step in reversed(steps_in(root)):
        with contextlib.suppress(FileNotFoundError):
            opened = checkpoint.OpenCheckpoint(root / str(step), None)
            opened.close()
            if not opened.damage:
                return _went_back(opened.metadata.get("lineage", {})), step
    return None


def _went_back(lineage: Any) -> int:
    return len(lineage.get("went_back_to") or [])


def _stamp(file: Path) -> Stamp | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _read_json(read: Any) -> dict[str, Any]:
    """A JSON object; empty if there is none or it is damaged."""
    try:
        found = json.loads(read())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _holder(lease: dict[str, Any]) -> str:
    return f"process {lease.get('pid', '?')} on host {lease.get('host', '?')}"
