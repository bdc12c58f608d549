"""Checkpoints in a bucket or on a mount, in the same layout as in a local folder.

A checkpoint is uploaded with its manifest last and deleted with its manifest first, so that one
which was cut never counts. What is downloaded is compared with the manifest.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from jaxgpt.data.cache import lock_cache
from jaxgpt.errors import InputError
from jaxgpt.manifest import MANIFEST, file_sha256, parse_manifest
from jaxgpt.paths import cache_folder, inside, split_step, url_key
from jaxgpt.store import Store, each
from jaxgpt.training.checkpoint.arrays import list_some
from jaxgpt.training.checkpoint.reader import EVALUATION, TRIES, Metadata, OpenCheckpoint
from jaxgpt.training.checkpoint.writer import delete_checkpoint

MODEL = ("ema", "params")
"""The items from which a model is loaded: the first of them that a checkpoint has."""
FOLDER = "checkpoints"
_STEP = re.compile(rf"{FOLDER}/(\d+)/(.+)")
KEPT = 2  # checkpoints of a run that stay in the cache
logger = logging.getLogger(__name__)


class Remote:
    """The checkpoints of the run in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._sent: dict[str, str] = {}  # the hashes of what is uploaded, by name

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, ascending."""
        return complete_steps(self.store.files(FOLDER))

    def manifest(self, step: int, folder: Path = Path()) -> dict[str, str]:
        """Reads a checkpoint's manifest; raises FileNotFoundError if there is no such checkpoint.

        Args:
            step: The step.
            folder: Where the files are downloaded to; names that lead out of it are refused.
        """
        return parse_manifest(self.store.read(f"{FOLDER}/{step}/{MANIFEST}"), folder)

    def measured(self, step: int) -> Metadata:
        """Reads a checkpoint's step and metrics, see `reader.read_measured`."""
        found: Metadata = {}
        for name in ("metrics.json", EVALUATION):
            with suppress(FileNotFoundError, ValueError, TypeError):
                found |= json.loads(self.store.read(f"{FOLDER}/{step}/{name}"))
        return found

    def best(self, steps: Collection[int]) -> int | None:
        """Returns the step with the lowest validation loss among `steps`, or None."""
        losses = {step: self.measured(step).get("val_loss") for step in steps}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        return min(known, key=lambda step: known[step], default=None)

    def upload(self, folder: Path) -> None:
        """Copies the checkpoint in a local folder, or what has changed in it, to the store.

        Raises:
            FileNotFoundError: It was deleted in the meantime.
            InputError: The store cannot be written.
        """
        opened = OpenCheckpoint(folder, ())  # protects it from being deleted
        try:
            if opened.damage:
                return  # the run's own folder reports it
            name = f"{FOLDER}/{folder.name}"
            content = (folder / MANIFEST).read_bytes()
            here = parse_manifest(content, folder)
            try:
                there = self.manifest(int(folder.name), folder)
            except (FileNotFoundError, InputError):
                there = {}
            if here == there:
                return
            if any(here.get(file) != digest for file, digest in there.items()):
                self.store.remove([f"{name}/{MANIFEST}"])

            def send(file: str) -> None:
                if self._sent.get(f"{name}/{file}") != here[file]:
                    self.store.upload(f"{name}/{file}", folder / file)
                    self._sent[f"{name}/{file}"] = here[file]

            each(send, [file for file in here if there.get(file) != here[file]])
            self.store.write(f"{name}/{MANIFEST}", content)
        finally:
            opened.close()

    def download(self, step: int, folder: Path, items: Collection[str] | None = None) -> list[str]:
        """Downloads a checkpoint and compares it with its manifest.

        Files that are in the folder already are not downloaded again, as after a download that
        was cut.

        Args:
            step: The step.
            folder: The folder to write to.
            items: The items to download in addition to the metadata; None: all.

        Returns:
            A message for each file that is missing or damaged. If there is none, the folder has the
            manifest too.

        Raises:
            FileNotFoundError: The checkpoint does not exist, or was deleted in the meantime.
            InputError: The store cannot be read.
        """
        name = f"{FOLDER}/{step}"
        folder.mkdir(parents=True, exist_ok=True)
        content = self.store.read(f"{name}/{MANIFEST}")
        try:
            digests = parse_manifest(content, folder)
        except InputError:
            return [f"{MANIFEST}: changed"]
        if (folder / MANIFEST).exists() and (folder / MANIFEST).read_bytes() != content:
            (folder / MANIFEST).unlink()
        wanted = [
            file
            for file in digests
            if "/" not in file or items is None or file.split("/")[0] in items
        ]
        damage = []

        def fetch(file: str) -> None:
            path = folder / file
            if path.is_file() and file_sha256(path) == digests[file]:
                return
            try:
                self.store.download(f"{name}/{file}", path)
            except FileNotFoundError:
                damage.append(f"{file}: missing")
            else:
                if file_sha256(path) != digests[file]:
                    damage.append(f"{file}: changed")
                    path.unlink()

        each(fetch, wanted)
        if damage:
            self.store.read(f"{name}/{MANIFEST}")  # raises if the checkpoint was deleted meanwhile
            return sorted(damage)
        (folder / MANIFEST).write_bytes(content)
        return []

    def delete(self, step: int) -> None:
        """Deletes a checkpoint, its manifest first."""
        name = f"{FOLDER}/{step}"
        self._sent = {n: d for n, d in self._sent.items() if not n.startswith(f"{name}/")}
        self.store.remove([f"{name}/{MANIFEST}"])
        self.store.remove(self.store.files(name))

    def set_aside(self, step: int, why: str) -> str:
        """Renames a checkpoint to STEP.WHY, or STEP.WHY-2 and so on; returns the new name."""
        listed = self.store.files(FOLDER)
        taken = {name.split("/")[1] for name in listed}
        name, number = f"{step}.{why}", 1
        while name in taken:
            number += 1
            name = f"{step}.{why}-{number}"
        old, new = f"{FOLDER}/{step}/", f"{FOLDER}/{name}/"
        files = [file for file in listed if file.startswith(old)]
        each(lambda file: self.store.copy(file, new + file.removeprefix(old)), files)
        self.delete(step)
        return name


def complete_steps(files: Collection[str]) -> list[int]:
    """Returns the steps of the complete checkpoints among a run's files, ascending."""
    matches = map(_STEP.fullmatch, files)
    return sorted(int(match[1]) for match in matches if match and match[2] == MANIFEST)


def partial_steps(files: Collection[str]) -> list[int]:
    """Returns the steps of checkpoints whose upload or deletion was cut, ascending."""
    found = {int(match[1]) for name in files if (match := _STEP.match(name))}
    return sorted(found - {*complete_steps(files)})


def find_remote(address: str) -> tuple[Remote, list[int]]:
    """Finds the checkpoints at a URL.

    Args:
        address: The URL of a run, RUN@best, RUN@STEP, or the URL of one checkpoint in a run.

    Returns:
        The run's checkpoints, and the steps to use of them, the best one last.

    Raises:
        InputError: There is no such checkpoint, or the URL cannot be read.
    """
    url, wanted = split_step(address.rstrip("/"))
    if match := re.fullmatch(rf"(.+)/{FOLDER}(?:/(\d+))?", url):
        url, wanted = match[1], match[2] or wanted
    remote = Remote(Store(url))
    if not (steps := remote.steps()):
        names = list_some(remote.store.names())
        hint = f"there are {names}" if names else "check the address"
        raise InputError(f"there is no checkpoint at {url}; {hint}")
    listed = ", ".join(map(str, steps))
    if wanted == "best":
        if (best := remote.best(steps)) is None:
            raise InputError(
                f"{url}@best: no checkpoint has a validation loss; use one of the steps {listed}"
            )
        return remote, [best]
    if wanted and (not wanted.isdecimal() or int(wanted) not in steps):
        raise InputError(
            f"{url}@{wanted}: no such checkpoint; use best or one of the steps {listed}"
        )
    return remote, [int(wanted)] if wanted else steps


def fetch_model(address: str) -> tuple[Path, str]:
    """Downloads the parameters of a checkpoint to the cache, unless they are there.

    Args:
        address: See `find_remote`; of a run, the newest intact checkpoint.

    Returns:
        The local folder of the checkpoint, and the item that was downloaded.

    Raises:
        InputError: There is no such checkpoint, it is damaged, or it cannot be read.
    """
    for _ in range(TRIES):
        remote, steps = find_remote(address)
        try:
            return _fetch_newest(remote, steps)
        except FileNotFoundError:  # deleted in the meantime, so there is a newer one now
            time.sleep(0.05)
    raise InputError(f"the checkpoints of {address} are deleted before they can be read; try again")


def _fetch_newest(remote: Remote, steps: list[int]) -> tuple[Path, str]:
    """Downloads the newest intact one of some checkpoints."""
    url = remote.store.url
    root = cache_folder() / "downloads" / FOLDER / url_key(url)
    damaged, items = [], set[str]()
    with lock_cache(root):
        for step in reversed(steps):
            with suppress(InputError):  # it is damaged, as `download` finds
                items = {name.split("/")[0] for name in remote.manifest(step, root)}
            item = next((name for name in MODEL if name in items), MODEL[-1])
            if found := remote.download(step, folder := root / str(step), (item,)):
                damaged.append(f"{step} is damaged: {list_some(found)}")
                continue
            os.utime(folder)
            for message in damaged:
                logger.warning("checkpoint %s/%s; using an older one", url, message)
            _forget_others(root, folder)
            return folder, item
    raise InputError(f"no checkpoint at {url} is intact: {'; '.join(damaged)}; use another run")


def _forget_others(root: Path, used: Path) -> None:
    """Deletes the downloads of a run that were used longest ago, unless they are open."""
    folders = [path for path in root.iterdir() if path.is_dir() and path != used]
    folders.sort(key=lambda path: path.stat().st_mtime)
    for folder in folders[: -(KEPT - 1)]:
        delete_checkpoint(folder)


def fetch_records(url: str) -> Path:
    """Downloads what reports need of a run: its config and metrics, but no arrays.

    Args:
        url: The URL of a run.

    Returns:
        A folder in the cache, like that of the run.

    Raises:
        InputError: There is no run, or it cannot be read.
    """
    store = Store(url.rstrip("/"))
    folder = cache_folder() / "downloads" / "runs" / url_key(store.url) / Path(store.url).name
    files = store.files()
    steps = complete_steps(files)
    if not steps and not {"config.json", "metrics.jsonl"} & files.keys():
        raise InputError(f"there is no run at {url}; check the address")
    with lock_cache(folder.parent):
        shutil.rmtree(folder, ignore_errors=True)
        download_files(store, folder, [n for n in files if re.fullmatch(r"[^/]+\.jsonl?", n)])
        for step in steps[-1:]:
            with suppress(FileNotFoundError):  # deleted in the meantime
                Remote(store).download(step, folder / FOLDER / str(step), ())
    return folder


def download_files(store: Store, folder: Path, names: Collection[str]) -> None:
    """Downloads files of a run that no manifest lists, such as its metrics.

    Raises:
        InputError: The store cannot be read, or a name leads out of the folder.
    """

    def fetch(name: str) -> None:
        path = inside(folder, name)
        draft = path.with_name(f"{path.name}.draft")
        with suppress(FileNotFoundError):  # deleted in the meantime
            store.download(name, draft)
            draft.replace(path)

    each(fetch, names)
