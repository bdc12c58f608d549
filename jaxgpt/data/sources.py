"""Opens the text at a path as a sequence of documents.

A path is one of
- `python`: the source code of the running Python's standard library, without its tests (12 MB);
- a file: one document per line of `.jsonl` and `.ndjson`, per row of `.parquet`, per value of a
  `.json` array, and, if `data.fields` sets a column, per row of `.csv` and `.tsv`; any other file
  is one document of plain text. Text files may be compressed with gzip (`.txt.gz`);
- a folder: all files below it with a suffix in `FOLDER_SUFFIXES`; other files are `skipped`;
- a glob: all files that it matches, whatever their suffix; `**` matches any number of folders;
- `tfds:...`: a TFDS dataset, see `jaxgpt.data.tfds`;
- `hf:...` or a URL: files that are downloaded first, see `jaxgpt.data.remote`.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from jaxgpt.data import formats, textfile
from jaxgpt.data.columns import fields_option, parse_fields
from jaxgpt.data.formats import Document, utf8_size
from jaxgpt.data.remote import fetch, is_remote
from jaxgpt.data.textfile import reading
from jaxgpt.data.tfds import open_tfds
from jaxgpt.errors import InputError
from jaxgpt.paths import regular_file

# fmt: off
FOLDER_SUFFIXES = (
    ".txt", ".md", ".rst", ".tex", ".html",
    *(suffix for suffix in formats.FORMATS if suffix != ".json"),  # which often has settings
    ".py", ".c", ".h", ".cc", ".cpp", ".java", ".js", ".ts", ".go", ".rs",
)
# fmt: on
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class TextSource:
    """The documents at a path, and the files they are read from, in a fixed order."""

    path: str
    files: tuple[str, ...]
    documents: Callable[[], Iterator[Document]]
    """Starts a new pass over the documents; raises InputError at the first one that is not text."""
    selection: str = ""
    """How the files are read (formats, columns, encodings, split), as part of the fingerprint."""
    skipped: tuple[str, ...] = ()
    """The files of a folder that are not read, each with the reason."""


def open_source(
    path: str,
    fields: Sequence[str] = (),
    encoding: str = "utf-8",
    note: Callable[[str], None] = lambda line: None,
    download: Callable[[str], Sequence[Path]] = fetch,
) -> TextSource:
    """Opens the text at a path and checks it, as far as possible without reading all of it.

    Args:
        path: A path; the module docstring lists the kinds.
        fields: The option `data.fields`: "text=COLUMN", or empty.
        encoding: The encoding of text without a byte order mark.
        note: Called with notes for the user, such as which column was guessed.
        download: Returns the local copies of the files at an `hf:` path or a URL.

    Returns:
        The documents at the path.

    Raises:
        InputError: The path does not exist; a file is empty, unreadable or not text; a folder or
            glob has no text; the column of the text is ambiguous; or TFDS cannot open the dataset.
    """
    with reading(path):
        if path.startswith("tfds:"):
            return _from_tfds(path, fields, note)
        files, skipped = list_local(path, download)
        return open_files(path, files, fields, encoding, note, skipped)


def list_local(
    path: str, download: Callable[[str], Sequence[Path]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files at a path that are read, and those that are skipped."""
    skipped: tuple[str, ...] = ()
    place = os.path.expanduser(path)
    if is_remote(path):
        files = tuple(map(str, download(path)))
    elif path == "python":
        files = standard_library()[1]
    elif os.path.isdir(place):
        files, skipped = _list_folder(place)
        if not files:
            raise InputError(
                f"the folder {path} contains no text: none of its {len(skipped)} files is visible, "
                f"non-empty and has a suffix of {' '.join(FOLDER_SUFFIXES)}; use a glob to read "
                "files with other suffixes"
            )
    elif os.path.exists(place):
        files = (place,)
    elif glob.has_magic(place):
        files = tuple(sorted(filter(os.path.isfile, glob.glob(place, recursive=True))))
        if not files:
            raise InputError(
                f"no file matches {path}; check the pattern (** matches any number of folders)"
            )
    else:
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):
            os.stat(place)  # raises any other error, such as a missing permission
        raise InputError(
            f"{path} does not exist; use a file, a folder, a glob, 'python', 'tfds:NAME', "
            "'hf:OWNER/NAME' or a URL"
        )
    return files, skipped


def open_files(
    path: str,
    files: Sequence[str],
    fields: Sequence[str] = (),
    encoding: str = "utf-8",
    note: Callable[[str], None] = lambda line: None,
    skipped: tuple[str, ...] = (),
) -> TextSource:
    """Opens local files as the text at a path; the arguments are those of `open_source`."""
    opened = [formats.open_documents(file, fields, encoding) for file in files]
    if not fields:
        for column, file in {each.column: each.path for each in reversed(opened)}.items():
            _note_guess(column, file, note)
        if table := next((file for file in files if formats.is_table(file)), None):
            note(f"{table} is read as plain text; use --data.fields text=COLUMN to read one column")
    return TextSource(
        path,
        tuple(files),
        lambda: chain.from_iterable(each.documents() for each in opened),
        selection=selection_of(opened),
        skipped=skipped,
    )


def _note_guess(column: str, path: str, note: Callable[[str], None]) -> None:
    if column not in ("", "text"):
        option = fields_option({"text": column})
        note(f"{path}: reading text from {column!r}, guessed from its name; same as {option}")


def selection_of(files: Sequence[formats.DocumentFile]) -> str:
    """Returns `TextSource.selection` for some files; empty if all are plain text in UTF-8."""
    columns = {file.column for file in files} - {""}
    kinds = [file.format.name if file.format else "text" for file in files]
    encodings = [file.encoding for file in files]
    selection = f"{', '.join(sorted(columns))} in {kinds}" if columns else ""
    return selection + (f" as {encodings}" if {*encodings} != {"utf-8"} else "")


def measure(source: TextSource, progress: Callable[[int], object] = lambda bytes: None) -> int:
    """Reads all documents once, which checks them, and returns their size in bytes of UTF-8.

    Args:
        source: The documents.
        progress: Called with the number of bytes read since the last call.

    Raises:
        InputError: Something is not text (the message names the file and position), or all
            documents are empty.
    """
    size = reported = 0
    for piece in chain.from_iterable(source.documents()):
        size += utf8_size(piece)
        if size - reported >= textfile.BLOCK:  # not for every record: there may be millions
            progress(size - reported)
            reported = size
    if not size:
        raise InputError(
            f"{source.path} contains no text, because all its documents are empty; use another path"
        )
    return size


def content_digest(
    source: TextSource, progress: Callable[[int], object] = lambda bytes: None
) -> str:
    """Returns the SHA-256 of the bytes of all files and of how they are read, not of their names.

    Args:
        source: The documents.
        progress: Called from several threads with the number of bytes read since the last call.

    Raises:
        InputError: A file cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda file: file_digest(file, progress), source.files))
    return combine_digests(source.selection, digests)


def file_digest(file: str, progress: Callable[[int], object] = lambda bytes: None) -> str:
    """Returns the SHA-256 of the bytes of a file; raises InputError if it cannot be read."""
    digest = hashlib.sha256()
    with reading(file), open(regular_file(file), "rb") as opened:
        while block := opened.read(textfile.BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def combine_digests(selection: str, digests: Iterable[str]) -> str:
    """Returns `content_digest` of files with these digests, which are read as `selection` says."""
    return hashlib.sha256("\n".join([selection, *digests]).encode()).hexdigest()


def file_states(source: TextSource) -> dict[str, tuple[int, int]]:
    """Returns the size and modification time of each file, to detect changes during reading.

    Raises:
        InputError: A file cannot be read.
    """
    states = {}
    for file in source.files:
        with reading(file):
            found = os.stat(file)
        states[file] = (found.st_size, found.st_mtime_ns)
    return states


def standard_library() -> tuple[str, tuple[str, ...]]:
    """Returns the folder of Python's standard library, and its source files except tests."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = set(folders) - NOT_LIBRARY
        found += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return root, tuple(sorted(file for file in found if os.path.getsize(file)))


def _list_folder(root: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    taken, skipped = [], []
    for folder, _, names in os.walk(root, onerror=_raise):
        for name in names:
            file = os.path.join(folder, name)
            suffix = formats.suffix_of(name)
            if any(part.startswith(".") for part in os.path.relpath(file, root).split(os.sep)):
                skipped.append(f"{file}: hidden")
            elif suffix not in FOLDER_SUFFIXES:
                skipped.append(f"{file}: its suffix is not read from folders")
            elif not os.path.isfile(file):
                skipped.append(f"{file}: not a regular file, or a broken link")
            elif not os.path.getsize(file):
                skipped.append(f"{file}: empty")
            else:
                taken.append(file)
    return tuple(sorted(taken)), tuple(sorted(skipped))


def _raise(error: OSError) -> None:
    """Raises an error of os.walk, which by default would skip a folder that cannot be read."""
    raise error


def _from_tfds(path: str, fields: Sequence[str], note: Callable[[str], None]) -> TextSource:
    records, builder, split = open_tfds(path)
    info = builder.info
    given = parse_fields(fields, ("text",))
    column = formats.text_column(path, list(info.features), given)
    if not fields:
        _note_guess(column, path, note)

    def documents() -> Iterator[Document]:
        with reading(path):
            for number, record in enumerate(records):
                yield (formats.field_text(record, column, f"{path} record {number}"),)

    return TextSource(
        path,
        tuple(str(file) for file in info.splits[split].filepaths),
        documents,
        selection=f"{column} of {info.full_name}, {split}",
    )
