"""From a path to the documents behind it. A path is

python      the standard library of the running interpreter, without its tests (12 MB)
a file      `.jsonl` and `.ndjson`: a document a line; `.parquet`: a document a row; `.json`: a
            document for each value of an array; `.csv` and `.tsv`, where `data.fields` names a
            column: a document a row; else text. Each may be compressed with gzip, as `.txt.gz`
a folder    recursively, the files with a suffix in `FOLDER_SUFFIXES`; the rest is `skipped`
a glob      every file it matches, whatever its suffix; `**` is any depth
tfds:NAME[/CONFIG][:VERSION][#SPLIT][@DATA_DIR]
            a TFDS data set prepared as array_record or parquet, read without TensorFlow; SPLIT
            is `train`, or whatever TFDS understands, as `train[:10%]`
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from jaxgpt.data import formats, textfile
from jaxgpt.data.columns import parse_fields, spelled
from jaxgpt.data.formats import Document, utf8_size
from jaxgpt.data.textfile import reading
from jaxgpt.errors import InputError
from jaxgpt.paths import regular_file

# fmt: off
FOLDER_SUFFIXES = (
    ".txt", ".md", ".rst", ".tex", ".html", ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet",
    ".py", ".c", ".h", ".cc", ".cpp", ".java", ".js", ".ts", ".go", ".rs",
)
# fmt: on
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """The documents behind a path, and the files they are read from, in a fixed order."""

    path: str
    files: tuple[str, ...]
    documents: Callable[[], Iterator[Document]]
    """Begins a new pass; raises InputError at the first thing that is not text."""
    selection: str = ""
    """What decides the documents besides the bytes of the files: formats, field, split."""
    skipped: tuple[str, ...] = ()
    """Files of a folder that were not taken, each with the reason."""


def open_source(
    path: str,
    fields: Sequence[str] = (),
    encoding: str = "utf-8",
    say: Callable[[str], None] = lambda line: None,
) -> Source:
    """The source at `path`, checked as far as is possible without reading it all.

    Args:
        path: See the top.
        fields: `data.fields`: "text=COLUMN", or empty.
        encoding: The encoding of text without a byte order mark.
        say: Gets the name of each column that was guessed, and that a table is read as text.

    Raises:
        InputError: The path is not there, a file is empty, cannot be read or holds no text by its
            first bytes, a folder or glob has no text, records have no column that is clearly the
            text, or TFDS cannot open the data set.
    """
    with reading(path):
        return _open_source(path, fields, encoding, say)


def _open_source(
    path: str, fields: Sequence[str], encoding: str, say: Callable[[str], None]
) -> Source:
    if path.startswith("tfds:"):
        return _from_tfds(path, fields, say)
    skipped: tuple[str, ...] = ()
    place = os.path.expanduser(path)
    if path == "python":
        files = standard_library()[1]
    elif os.path.isdir(place):
        files, skipped = _list_folder(place)
        if not files:
            raise InputError(
                f"the folder {path} holds no text: of its {len(skipped)} files none is visible, "
                f"not empty and one of {' '.join(FOLDER_SUFFIXES)}; a glob takes any name"
            )
    elif os.path.exists(place):
        files = (place,)
    elif glob.has_magic(place):
        files = tuple(sorted(filter(os.path.isfile, glob.glob(place, recursive=True))))
        if not files:
            raise InputError(f"no file matches {path}; check the pattern (** is any depth)")
    else:
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):
            os.stat(place)  # raises the reason if it is another, such as a missing permission
        raise InputError(
            f"there is no {path}; give a file, a folder, a glob, 'python' or 'tfds:NAME'"
        )
    opened = [formats.open_documents(file, fields, encoding) for file in files]
    if not fields:
        for column, file in {each.column: each.path for each in reversed(opened)}.items():
            _say_guess(column, file, say)
        if table := next((file for file in files if formats.kind_of(file) == "table"), None):
            say(f"{table} is read as plain text; --data.fields text=COLUMN reads one column of it")
    return Source(
        path,
        files,
        lambda: chain.from_iterable(each.documents() for each in opened),
        selection=_selection(opened),
        skipped=skipped,
    )


def _say_guess(column: str, path: str, say: Callable[[str], None]) -> None:
    if column not in ("", "text"):
        say(f"{path}: the text is in {column!r}, by its name; {spelled({'text': column})} says so")


def _selection(files: Sequence[formats.DocumentFile]) -> str:
    """What decides the documents besides the bytes of the files; empty for plain UTF-8."""
    columns = {file.column for file in files} - {""}
    kinds = [file.kind for file in files]
    encodings = [file.encoding for file in files]
    selection = f"{', '.join(sorted(columns))} in {kinds}" if columns else ""
    return selection + (f" as {encodings}" if {*encodings} != {"utf-8"} else "")


def measure(source: Source, progress: Callable[[int], Any] = lambda bytes: None) -> int:
    """The size of the text in bytes of UTF-8, by reading it once; `progress` gets it in parts.

    Raises InputError, naming file and place, for whatever is not text, and if there is no text.
    """
    size = told = 0
    for piece in chain.from_iterable(source.documents()):
        size += utf8_size(piece)
        if size - told >= textfile.BLOCK:  # not for every record: there may be millions
            progress(size - told)
            told = size
    if not size:
        raise InputError(f"{source.path} holds no text: all its documents are empty")
    return size


def content_digest(source: Source, progress: Callable[[int], Any] = lambda bytes: None) -> str:
    """SHA-256 over the bytes of all files and how they are read; not over their names.

    `progress`, called from several threads, gets the number of bytes in parts.
    """

    def file_digest(file: str) -> str:
        digest = hashlib.sha256()
        with reading(file), open(regular_file(file), "rb") as opened:
            while block := opened.read(textfile.BLOCK):
                digest.update(block)
                progress(len(block))
        return digest.hexdigest()

    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_digest, source.files))
    return hashlib.sha256("\n".join([source.selection, *digests]).encode()).hexdigest()


def file_states(source: Source) -> dict[str, tuple[int, int]]:
    """Size and modification time of each file, to see whether one changes while it is read.

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
    """The folder of the running interpreter's library, and its source files but for its tests."""
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
                skipped.append(f"{file}: not taken from a folder by its suffix")
            elif not os.path.isfile(file):
                skipped.append(f"{file}: not a regular file, or a link to nothing")
            elif not os.path.getsize(file):
                skipped.append(f"{file}: empty")
            else:
                taken.append(file)
    return tuple(sorted(taken)), tuple(sorted(skipped))


def _raise(error: OSError) -> None:
    """For os.walk, which would leave out a folder that cannot be read."""
    raise error


def open_tfds(path: str) -> tuple[Any, Any, str]:
    """A TFDS data set: its records, its builder, and the name of the split; see the top."""
    import tensorflow_datasets as tfds

    spec, _, data_dir = path.removeprefix("tfds:").partition("@")
    name, _, split = spec.partition("#")
    split = split or "train"
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)
        records = builder.as_data_source(split)
        info = builder.info.splits[split]
    except Exception as error:  # TFDS raises whatever it likes for a bad name, AssertionError too
        raise InputError(
            f"TFDS cannot open {path}: {str(error).strip().splitlines()[0]} Prepare it beforehand "
            "with file_format='array_record' or 'parquet', and name its folder after @"
        ) from error
    if len(records) != info.num_examples:
        raise InputError(
            f"TFDS ignores the slice in {path}: it reads {len(records)} records, not "
            f"{info.num_examples}; prepare the data set with file_format='array_record'"
        )
    return records, builder, split


def _from_tfds(path: str, fields: Sequence[str], say: Callable[[str], None]) -> Source:
    records, builder, split = open_tfds(path)
    info = builder.info.splits[split]
    given = parse_fields(fields, ("text",))
    column = formats.text_column(path, list(builder.info.features), given)
    if not fields:
        _say_guess(column, path, say)

    def documents() -> Iterator[Document]:
        with reading(path):
            for number, record in enumerate(records):
                yield (formats.field_text(record, column, f"{path} record {number}"),)

    return Source(
        path,
        tuple(str(file) for file in info.filepaths),
        documents,
        selection=f"{column} of {builder.info.full_name}, {split}",
    )
