"""Writing to a folder of the cache: one process at a time, and nothing half written is left."""

import errno
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from jaxgpt.data.notes import print_note
from jaxgpt.errors import InputError

ABANDONED = 24 * 3600.0  # seconds without a write after which a partial entry is deleted


@contextmanager
def lock_cache(cache: Path) -> Iterator[None]:
    """Holds the lock for writing to the cache, and deletes partial entries of killed processes.

    Raises:
        InputError: The cache cannot be written.
    """
    with ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # Opened for writing, because NFS does not lock files that are open for reading only.
            lock = stack.enter_context(open(cache / "lock", "a"))
        except OSError as error:
            raise InputError(
                f"cannot write to {cache} ({error}); set data.cache to another folder"
            ) from None
        locked = _lock(lock, cache)
        for partial in cache.glob("*.partial"):
            # The lock excludes other writers on this machine, but perhaps not those of another
            # machine that shares the folder; whether they still write is judged by the age.
            here = locked and partial.name.endswith(_partial_suffix())
            if here or _seconds_since_write(partial) > ABANDONED:
                shutil.rmtree(partial, ignore_errors=True)
        yield


def _lock(lock: IO[str], cache: Path) -> bool:
    """Waits for the lock; returns False if the file system, such as a network mount, has none."""
    import fcntl

    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_note(
                f"waiting for another process that is writing to {cache}; Ctrl-C stops waiting"
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        return False  # so two processes may tokenize the same text, each in its own folder
    return True


def partial_name(entry: Path) -> Path:
    """Returns a new temporary name beside the entry, which contains the name of this machine."""
    return entry.with_name(f"{entry.name}.{uuid.uuid4().hex}{_partial_suffix()}")


def _partial_suffix() -> str:
    return f".{platform.node()}.partial"


def _seconds_since_write(folder: Path) -> float:
    try:
        return time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:  # its writer has just renamed or removed a file
        return 0.0


def sync_folder(folder: Path) -> None:
    """Flushes a folder's directory entries to disk, if the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)
