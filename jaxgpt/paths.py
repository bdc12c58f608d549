"""File paths: the cache folder, and checks of paths that come from untrusted folders."""

import hashlib
import os
import re
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

from jaxgpt.errors import InputError


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL, such as gs://bucket/runs."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(path)) is not None


def refuse_url(path: str | Path) -> None:
    """Raises InputError if a path is a URL, of which Python would make a local folder `gs:`."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise InputError(
            f"{path} is a URL, and this has to be a local path; URLs (with two slashes, gs://...) "
            "are for training data, for `runs`, and for the runs and models that are loaded"
        )


def join(root: str, name: str) -> str:
    """Joins a folder or a URL with the name of something in it."""
    return f"{root.rstrip('/')}/{name}" if is_url(root) else str(Path(root) / name)


def split_step(path: str | Path) -> tuple[str, str]:
    """Splits RUN@STEP into the run, a path or a URL, and the step; empty if there is none.

    >>> split_step("runs/a@best"), split_step("sftp://me@host/runs/a")
    (('runs/a', 'best'), ('sftp://me@host/runs/a', ''))
    """
    run, _, step = str(path).rpartition("@")
    return (str(path), "") if not run or "/" in step else (run, step)


def place_of(path: str) -> str:
    """Returns the place of the run in a path like RUN or RUN@STEP: a folder or a URL."""
    run = split_step(path)[0]
    return run.rstrip("/") if is_url(run) else str(expand(run))


def url_key(url: str) -> str:
    """Returns a name for a local folder that belongs to a URL or a path; no two have the same."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", url)[-60:].strip("-")
    return f"{words}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def expand(path: str | Path) -> Path:
    """Expands `~` in a path to the user's home folder.

    Text that is not a path, such as a model's name, is returned unchanged.

    Raises:
        InputError: The path is a URL, or starts with `~`, and the user has no home folder.
    """
    refuse_url(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # such as a container's user without an account
        raise InputError(f"cannot expand ~ in {path}: {error}; use an absolute path") from None


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in a folder, after checking that it is inside the folder.

    In Hugging Face's cache, where `MODEL/snapshots/REVISION/file` is a link to `MODEL/blobs/HASH`,
    a link may lead anywhere inside `MODEL`.

    Args:
        folder: The folder.
        name: The file's path relative to the folder; the file need not exist.

    Raises:
        InputError: The name is absolute or contains `..`, or the file is a link that leads out of
            the folder or is broken.
    """
    if not isinstance(name, str) or name in ("", ".") or "\0" in name:
        raise InputError(f"{name!r} is not a file name; use the name of a file in {folder}")
    parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in parts:
        raise InputError(
            f"{name!r} leads out of {folder}; use the name of a file inside it, without '..'"
        )
    path = folder / name
    try:
        root = folder.resolve()
        target = path.resolve()
        if target.is_symlink():  # Python 3.13 resolves a link to itself without an error
            raise RuntimeError("it is a link to itself")
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{path} cannot be resolved ({error}); replace the link by the file itself"
        ) from None
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not target.is_relative_to(root):
        raise InputError(
            f"{path} is a link out of the folder, to {target}; replace the link by the file itself"
        )
    return path


def regular_file(path: str | Path) -> Path:
    """Returns the path of a regular file, or of a link to one, as a Path.

    Call this before opening a path from untrusted input: opening a FIFO waits for a writer,
    possibly forever, and reading a device may never end.

    Raises:
        InputError: The path does not exist, or is a folder, FIFO, device or socket.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read: {reason}; use the path of a file") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(mode), "device")
        raise InputError(f"{path} cannot be read: it is a {kind}; use the path of a regular file")
    return path


def cache_folder(given: str = "") -> Path:
    """Returns the cache folder: `given` if it is not empty, else $JAXGPT_CACHE, ~/.cache/jaxgpt.

    Raises:
        InputError: The path is a URL, or starts with `~`, and the user has no home folder.
    """
    root = given or os.environ.get("JAXGPT_CACHE") or "~/.cache/jaxgpt"
    refuse_url(root)
    try:
        return Path(root).expanduser()
    except RuntimeError as error:  # such as a container's user without an account
        raise InputError(
            f"cannot expand ~ in {root}: {error}; set JAXGPT_CACHE to a folder"
        ) from None


def keep_compiled_programs() -> None:
    """Enables JAX's persistent compilation cache in the user's cache folder.

    The next process that needs the same program loads it instead of compiling it again. Does
    nothing if JAX already has a compilation cache, or the folder cannot be created.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        try:
            folder = cache_folder() / "compiled"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)  # its content is executed, so no other user may write to it
        except (OSError, InputError):  # it cannot be created, or belongs to another user
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
