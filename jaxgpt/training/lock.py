"""The lock on a run's folder: one process at a time trains a run.

The lock is `flock` on the file `lock` in the folder, so it ends with the process that holds it,
even after a crash. The file says which process that is.
"""

import contextlib
import errno
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from jaxgpt.errors import InputError, TrainingError

# What flock answers on mounts that have no locks, such as some network file systems.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def flock(fd: int, *, shared: bool = False) -> bool:
    """Takes a lock on an open file or folder without waiting.

    Returns:
        Whether the file system has locks; if not, nothing is locked.

    Raises:
        BlockingIOError: Another process holds a lock that excludes this one.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS | {errno.EBADF}:
            raise
        return False
    return True


class RunLock:
    """Holds a run's folder, which is made if it does not exist; a context manager.

    A folder that holds nothing but the lock at the end, as after bad input, is removed again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._path = self.folder / "lock"
        self._fd = -1

    def __enter__(self) -> "RunLock":
        """Raises InputError if another process holds the lock or the folder cannot be written."""
        try:
            while not self._take():
                pass
        except BlockingIOError:
            raise InputError(
                f"{self.folder} is being trained by {_read_holder(self._path)}; wait for it, stop "
                "it, or set another name"
            ) from None
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be written: {error.strerror}; make room, or set `runs` to "
                "another folder"
            ) from None
        return self

    def _take(self) -> bool:
        """Opens and locks the file; False if the process that held it removed it meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not flock(fd):
                print(
                    f"warning: {self.folder} is on a file system without locks: make sure that no "
                    "other process trains this run",
                    file=sys.stderr,
                )
            if not _is_file(fd, self._path):
                os.close(fd)
                return False
            holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
            os.ftruncate(fd, 0)
            os.pwrite(fd, holder.encode() + b"\n", 0)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(fd)
            raise
        self._fd = fd
        return True

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(OSError):  # the folder is not empty, or is gone
            if os.listdir(self.folder) == ["lock"] and _is_file(self._fd, self._path):
                self._path.unlink()
                self.folder.rmdir()
        os.close(self._fd)

    def check(self) -> None:
        """Raises TrainingError if the folder was removed or replaced since it was locked."""
        if not _is_file(self._fd, self._path):
            raise TrainingError(
                f"{self.folder} has disappeared or is another folder now; put it back, or mount "
                "its disk again"
            )


def find_holder(folder: Path) -> str:
    """The process that holds the lock on a run's folder; empty if none does."""
    path = folder / "lock"
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return ""
    try:
        flock(fd, shared=True)
    except BlockingIOError:
        return _read_holder(path)
    finally:
        os.close(fd)
    return ""


def _is_file(fd: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def _read_holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on host {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
