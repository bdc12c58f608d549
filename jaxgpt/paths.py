"""Where files are: in the cache, and in a folder from elsewhere, that none may lead out of."""

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

from jaxgpt.errors import InputError


def expand(path: str | Path) -> Path:
    """A path with `~` as the user's home folder; InputError if there is none.

    Text that is no path, such as a model's name, stays as it is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # such as a container's user that the system does not know
        raise InputError(f"{path} leads nowhere: {error}; use the whole path") from None


def inside(folder: Path, name: str) -> Path:
    """The path of file `name` of `folder`, whether it exists or not.

    Raises InputError for a name that is absolute or has `..`, and for a link that leads out of the
    folder. In Hugging Face's cache, where `MODEL/snapshots/REVISION/file` is a link to
    `MODEL/blobs/HASH`, it may lead anywhere inside `MODEL`.
    """
    if not isinstance(name, str) or name in ("", ".") or "\0" in name:
        raise InputError(f"{name!r} is not the name of a file in {folder}; give one")
    parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in parts:
        raise InputError(
            f"{name!r} leads out of {folder}; give the name of a file inside, without '..'"
        )
    path = folder / name
    try:
        root = folder.resolve()
        target = path.resolve()
        if target.is_symlink():  # from Python 3.13 on, what a link to itself resolves to
            raise RuntimeError("it is a link to itself")
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} leads nowhere ({error}); put the file itself there") from None
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not target.is_relative_to(root):
        raise InputError(
            f"{path} is a link out of the folder, to {target}; put the file itself there"
        )
    return path


def regular_file(path: str | Path) -> Path:
    """Returns the path of a regular file, or of a link to one, as a Path.

    To open a FIFO waits for a writer, possibly forever, and a device may never end, so this is
    called before a file that somebody else chose is opened.

    Raises:
        InputError: Nothing is there, or something else: a folder, FIFO, device or socket.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read: {reason}; give the path of a file") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(mode), "device")
        raise InputError(f"{path} cannot be read: it is a {kind}; give the path of a regular file")
    return path


def cache_folder(given: str = "") -> Path:
    """The folder for files that can be made again: `given`, $JAXGPT_CACHE or ~/.cache/jaxgpt.

    Raises:
        InputError: The path begins with `~` and the user has no home folder.
    """
    root = given or os.environ.get("JAXGPT_CACHE") or "~/.cache/jaxgpt"
    try:
        return Path(root).expanduser()
    except RuntimeError as error:  # such as a container's user that the system does not know
        raise InputError(f"{root} leads nowhere: {error}; set JAXGPT_CACHE to a folder") from None


def keep_compiled_programs() -> None:
    """Keeps the programs that jax compiles in the user's own cache, unless jax has one already.

    The next process that needs the same program loads it instead of compiling it again.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        try:
            folder = cache_folder() / "compiled"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)  # its content is executed: nobody else may write there
        except (OSError, InputError):  # it cannot be made, or belongs to somebody else
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
