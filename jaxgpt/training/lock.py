"""A lock on a run's folder, so that one process at a time trains a run.

It is a `flock` on the file `lock` in the folder, which the operating system releases when the
process ends, even after a crash. The file has the process's host and id.
"""

import contextlib
import errno
import json
import os
import socket
import sys
from pathlib import Path

from jaxgpt.errors import InputError, TrainingError

# The errors of flock on file systems without locks, such as some network file systems.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def flock(fd: int, *, shared: bool = False) -> bool:
    """Locks an open file or folder without waiting.

    Args:
        fd: The file descriptor.
        shared: Whether other processes may hold a shared lock at the same time.

    Returns:
        Whether the file system supports locks; if not, nothing is locked.

    Raises:
        BlockingIOError: Another process holds a conflicting lock.
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
    """A context manager that creates and locks a run's folder.

    On exit, a folder that has nothing but the lock file (for example after invalid input) is
    removed.
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
                "it, or use another run name"
            ) from None
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be written: {error.strerror}; free disk space, or set "
                "`runs` to another folder"
            ) from None
        return self

    def _take(self) -> bool:
        """Opens and locks the file; returns False if another process has just removed it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not flock(fd):
                print(
                    f"warning: {self.folder} is on a file system without locks; make sure that no "
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

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the folder is not empty or was removed
            if os.listdir(self.folder) == ["lock"] and _is_file(self._fd, self._path):
                self._path.unlink()
                self.folder.rmdir()
        os.close(self._fd)

    def check(self) -> None:
        """Raises TrainingError if the folder was removed or replaced since it was locked."""
        if not _is_file(self._fd, self._path):
            raise TrainingError(
                f"{self.folder} has disappeared or was replaced; restore it, or mount its disk "
                "again"
            )


def find_holder(folder: Path) -> str:
    """Describes the process that holds the lock on a run's folder; "" if none does."""
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
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def _read_holder(path: Path) -> str:
    """Describes the process that wrote a lock file."""
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on host {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
