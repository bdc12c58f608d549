"""SHA-256 manifests, with which damage to the files of a folder is detected before they are used.

A manifest is the file `SHA256SUMS` in the folder that it describes, in the format of `sha256sum`,
so that `sha256sum --check SHA256SUMS` verifies the folder by hand. It is written last and
atomically, so a folder that has one is complete. Files that it does not list, such as `.DS_Store`
or an editor's backup, are ignored.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from jaxgpt.errors import InputError
from jaxgpt.paths import inside, regular_file

MANIFEST = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\n]+)")  # `sha256sum --binary` writes the *


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal; raises OSError if it cannot be read."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Hashes the files of a folder, flushes them to disk and writes the manifest atomically.

    Args:
        folder: The folder; an existing manifest is replaced.
        names: The files to list, relative to the folder; by default all files below it.

    Raises:
        OSError: A file cannot be read, or the disk is full.
    """
    if names is None:
        files = (file for file in folder.rglob("*") if file.is_file())
        names = {file.relative_to(folder).as_posix() for file in files}
        names -= {MANIFEST, f"{MANIFEST}.draft"}
    listed = sorted(names)

    def sync_and_hash(name: str) -> str:
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
            return hashlib.file_digest(stream, "sha256").hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(sync_and_hash, listed))
    _replace(folder, dict(zip(listed, digests, strict=True)))


def format_manifest(digests: Mapping[str, str]) -> str:
    """Returns the text of a manifest of hashes by file name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def add_to_manifest(folder: Path, name: str) -> None:
    """Adds a file to a folder's manifest, or updates its hash, atomically."""
    _replace(folder, read_manifest(folder) | {name: file_sha256(folder / name)})


def read_manifest(folder: Path) -> dict[str, str]:
    """Reads the manifest of a folder.

    Returns:
        The hash of each listed file, by its name relative to the folder.

    Raises:
        InputError: A line is not a hash and the name of a file inside the folder, or the manifest
            is not a regular file.
        OSError: The manifest cannot be read.
    """
    path = folder / MANIFEST
    if path.exists():
        regular_file(path)
    return parse_manifest(path.read_bytes(), folder)


def parse_manifest(content: bytes, folder: Path) -> dict[str, str]:
    """Parses the content of a manifest, see `read_manifest`; `folder` is where its files are."""
    text = content.decode(errors="replace")
    lines = text.removesuffix("\n").split("\n") if text else []
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        name = PurePosixPath(match[2]).as_posix() if match else ""  # `sha256sum ./*` adds ./
        if match is None or name in digests:
            raise InputError(
                f"{folder / MANIFEST}:{number} is not a SHA-256 and a file name that is new"
            )
        inside(folder, name)
        digests[name] = match[1]
    return digests


def find_damage(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Compares the files of a folder with its manifest.

    Args:
        folder: A folder with a manifest.
        wanted: A predicate that selects the listed files to check, by name; by default all.

    Returns:
        A description of each damage, such as `train/d/1b9f: changed`; empty if there is none.

    Raises:
        InputError: A file exists, but cannot be read. This is not reported as damage, because
            reading it may succeed later.
    """
    try:
        digests = {name: digest for name, digest in read_manifest(folder).items() if wanted(name)}
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return [f"{MANIFEST}: missing"]
    except InputError:
        return [f"{MANIFEST}: changed"]
    except OSError as error:
        raise _unreadable(folder / MANIFEST, error) from error

    def compare(name: str) -> str:
        try:
            if not (folder / name).is_file():
                return f"{name}: missing"
            return "" if file_sha256(folder / name) == digests[name] else f"{name}: changed"
        except FileNotFoundError:
            return f"{name}: missing"
        except OSError as error:
            raise _unreadable(folder / name, error) from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [found for found in pool.map(compare, sorted(digests)) if found]


def check_manifest(folder: Path, names: Iterable[str]) -> None:
    """Checks files against the manifest of their folder, if it has one, before they are read.

    Args:
        folder: The folder.
        names: The files that will be read. Other files, such as an edited README.md, are ignored,
            and so are files that the manifest does not list.

    Raises:
        InputError: A file was changed or is missing, or the manifest itself is damaged.
    """
    wanted = set(names)
    if os.path.lexists(folder / MANIFEST) and (damage := find_damage(folder, wanted.__contains__)):
        raise InputError(
            f"{folder} does not match its {MANIFEST} ({', '.join(damage)}); download or copy the "
            f"folder again, or delete {MANIFEST} if you made the change yourself"
        )


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} cannot be read: {error.strerror or error}; the file may be intact, so check the "
        "disk or the mount, and try again"
    )


def _replace(folder: Path, digests: dict[str, str]) -> None:
    draft = folder / f"{MANIFEST}.draft"
    with draft.open("w") as stream:
        stream.write(format_manifest(digests))
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(folder / MANIFEST)
