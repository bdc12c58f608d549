"""Files in a folder that is elsewhere: in a bucket (gs://, s3://) or on a mount, through fsspec.

Names are relative to the folder, with slashes. An object of a bucket appears whole or not at all;
on a mount, `write` replaces a file in the same way, and `upload` does not.
"""

import errno
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from jaxgpt.download import explain_url, first_line, in_background, missing_package, reason
from jaxgpt.errors import InputError

Answer = TypeVar("Answer")

AT_ONCE = 8  # files that are copied at the same time
PAUSES = (1.0, 4.0)  # seconds before each repetition of a request that failed
ANSWER_SECONDS = 30.0  # the longest time for small requests, with their repetitions
SLOWEST = 50_000.0  # bytes a second, at which a file has to be written at least
STALLED_SECONDS = 300.0  # without a byte, after which a large file has failed


class Store:
    """A folder at a URL or on a mount.

    A request that fails is repeated; what it raises then is an InputError that says why.

    Args:
        url: The URL, or the path of a local folder.

    Raises:
        InputError: The protocol is unknown, or needs a package that is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.sent_at = time.monotonic()
        """When bytes of a file were last sent, on the clock of `time.monotonic`."""
        self._moved_at = self.sent_at
        try:
            import fsspec
            from fsspec.implementations.local import LocalFileSystem

            # It logs a traceback for each of its own repetitions; what is raised here explains it.
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise missing_package(url, error) from None
        except Exception as error:  # of many libraries
            raise explain_url(url, error) or InputError(
                f"{url} cannot be used: {first_line(error)}"
            ) from None
        self._root = root.rstrip("/")
        self._made = False  # whether the folder exists, or did
        self._local = isinstance(self._fs, LocalFileSystem)

    def files(self, under: str = "") -> dict[str, int]:
        """Returns the names of all files below a folder, with their sizes."""

        def find() -> dict[str, Any]:
            self._fs.invalidate_cache()
            found: dict[str, Any] = self._fs.find(self._path(under), detail=True)
            return found

        try:
            found = self._ask(find, seconds=4 * ANSWER_SECONDS)
        except FileNotFoundError:
            return {}
        prefix = f"{self._path(under.rstrip('/'))}/"  # a store may also list what begins like it
        return {
            name.removeprefix(f"{self._root}/"): int(info.get("size") or 0)
            for name, info in sorted(found.items())
            if name.startswith(prefix) and not name.endswith(("/", ".draft"))
        }

    def names(self) -> list[str]:
        """Returns the names of the files and folders in this folder, without those below."""

        def find() -> list[str]:
            self._fs.invalidate_cache()
            found: list[str] = self._fs.ls(self._root, detail=False)
            return found

        try:
            found = self._ask(find)
        except FileNotFoundError:
            return []
        return sorted({name.rstrip("/").rpartition("/")[2] for name in found})

    def read(self, name: str) -> bytes:
        """Returns the content of a file; raises FileNotFoundError if there is none."""
        content: bytes = self._ask(partial(self._fs.cat_file, self._path(name)), name)
        return content

    def write(self, name: str, content: bytes) -> None:
        """Writes or replaces a file."""
        path = self._path(name)

        def replace() -> None:
            draft = Path(f"{path}.draft")
            self._make_folder(path)
            draft.write_bytes(content)
            draft.replace(path)

        pipe = partial(self._fs.pipe_file, path, content)
        work = replace if self._local else pipe
        self._ask(work, name, missing=True, seconds=ANSWER_SECONDS + len(content) / SLOWEST)

    def upload(self, name: str, file: Path) -> None:
        """Copies a local file to the folder."""
        path = self._path(name)

        def put() -> None:
            self._make_folder(path)
            self._fs.put_file(str(file), path, callback=self._callback(True))

        self._ask(put, name, missing=True, seconds=0.0)
        self.sent_at = time.monotonic()

    def download(self, name: str, file: Path) -> None:
        """Copies a file to a local one; raises FileNotFoundError if there is none."""
        file.parent.mkdir(parents=True, exist_ok=True)
        path = self._path(name)

        def get() -> None:
            self._fs.get_file(path, str(file), callback=self._callback(False))

        self._ask(get, name, seconds=0.0)

    def remove(self, names: Iterable[str]) -> None:
        """Deletes files; those that do not exist are ignored."""

        def remove(name: str) -> None:
            try:
                self._ask(partial(self._fs.rm_file, self._path(name)), name)
            except FileNotFoundError:
                return

        folders = {name.rpartition("/")[0] for name in each(remove, names)}
        if self._local:  # buckets have no folders
            for folder in sorted(folders, key=len, reverse=True):
                _remove_empty(Path(self._path(folder)), Path(self._root))

    def copy(self, name: str, to: str) -> None:
        """Copies a file within the folder."""
        path, target = self._path(name), self._path(to)

        def copy() -> None:
            self._make_folder(target)
            self._fs.cp_file(path, target)

        self._ask(copy, name)

    def _make_folder(self, path: str) -> None:
        """Makes the folder of a file, which buckets do not need.

        Raises FileNotFoundError if the store has disappeared: a folder that is made where something
        was mounted would hide that.
        """
        if self._local:
            if self._made and not os.path.isdir(self._root):
                raise FileNotFoundError(errno.ENOENT, "it has disappeared")
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._made = True

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _callback(self, sends: bool) -> Any:
        from fsspec.callbacks import Callback

        store = self

        class Progress(Callback):
            def call(self, *_: object, **__: object) -> None:
                store._moved_at = time.monotonic()
                store.sent_at = store._moved_at if sends else store.sent_at

        return Progress()

    def _ask(
        self,
        work: Callable[[], Answer],
        name: str = "",
        missing: bool = False,
        seconds: float | None = None,
    ) -> Answer:
        """Returns what `work` does, which is repeated if it fails.

        Args:
            work: The request.
            name: The file that it is about.
            missing: Whether a FileNotFoundError means that the bucket is missing, not the file.
            seconds: The longest time for it; None: `ANSWER_SECONDS`; 0: any time, as long as bytes
                are sent or received.
        """
        pauses = iter(PAUSES)
        seconds = ANSWER_SECONDS if seconds is None else seconds
        deadline = time.monotonic() + (seconds or math.inf)
        while True:
            try:
                found = self._wait(work, deadline)
            except Exception as error:  # of many libraries
                if isinstance(error, FileNotFoundError) and not missing:
                    raise FileNotFoundError(f"{self.url}/{name}") from None
                failed = self._explain(error)
                pause = next(pauses, math.inf)
                if failed is not None or time.monotonic() + pause >= deadline or pause == math.inf:
                    raise failed or InputError(
                        f"{self.url} {reason(error)}; check the address and the network"
                    ) from None
                time.sleep(pause)
            else:
                return found

    def _wait(self, work: Callable[[], Answer], deadline: float) -> Answer:
        began = time.monotonic()
        answer = in_background(work)
        while not wait([answer], 1.0).done:
            now, moved = time.monotonic(), max(began, self._moved_at)
            if now > min(deadline, moved + STALLED_SECONDS):
                raise TimeoutError(f"no answer for {now - moved:.0f} seconds")
        return answer.result()

    def _explain(self, error: Exception) -> InputError | None:
        """Explains an error that another try does not change; None for other errors."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return InputError(
                f"there is no space left to copy {self.url} ({error}); free disk space, or set "
                "checkpoint.local or JAXGPT_CACHE to a folder on another disk"
            )
        if isinstance(error, NotImplementedError):
            return InputError(f"{self.url} can be read and not written; use a bucket or a folder")
        if self._local and isinstance(error, OSError):
            return InputError(
                f"{self.url} cannot be written: {error.strerror or error}; check that it is "
                "mounted and has space, or use another folder"
            )
        return explain_url(self.url, error)


def each(work: Callable[[str], object], names: Iterable[str]) -> list[str]:
    """Calls a function for several files at the same time; returns the names."""
    names = list(names)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(work, names))
    return names


def _remove_empty(folder: Path, root: Path) -> None:
    while folder != root and folder.is_relative_to(root):
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
