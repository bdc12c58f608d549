"""From a file to its documents: plain text, JSON lines, parquet.

A document is an iterable of pieces of text that can be read more than once. A record is one piece;
a plain text file is one document, read in pieces of a mebibyte, so that it need not fit in memory.
Text is UTF-8 and arrives as it is: no newline, byte order mark or space is changed. What is not
text raises InputError with the file and the place.

Whatever a file claims, it is read in bounded memory: a line of JSON lines has LARGEST_RECORD bytes
at most, and the values of a parquet file, which may be compressed without measure, take no more
than `expansion_limit`.
"""

import codecs
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from jaxgpt import strict_json
from jaxgpt.errors import InputError
from jaxgpt.paths import regular_file

Document = Iterable[str]
Kind = Literal["text", "jsonl", "parquet"]

BLOCK = 1 << 20  # bytes of a plain text file read at a time
LARGEST_RECORD = 1 << 26  # bytes of one line of JSON lines
BATCH_ROWS, BATCH_BYTES = 1024, 1 << 26  # of a parquet file in memory at once
BATCH_NESTED = 64  # rows of columns with lists or structs, which may repeat what a file has once
MOST_EXPANSION = 100  # bytes of values for each byte of a parquet file; prose has 3 to 10
ALWAYS_ALLOWED = 1 << 30  # bytes of values of a parquet file, however small it is
VALUE_BYTES = 64  # what a value takes besides its text


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError into an InputError that names the file, or `path` if the error has none."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or path} cannot be read: {error.strerror or error}; check that it "
            "is there, that you may read it, and that its disk or mount works"
        ) from error


def kind_of(file: str) -> Kind:
    """What a file is read as, by its suffix: all that is neither JSON lines nor parquet is text."""
    suffixes: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
    return suffixes.get(os.path.splitext(file)[1].lower(), "text")


def check(file: str, text_field: str) -> None:
    """Raises InputError for what can be seen without reading the file.

    That is something that is no regular file, no bytes, and no such column.
    """
    regular_file(file)
    if not os.path.getsize(file):
        raise InputError(f"{file} is empty; leave it out of the paths")
    if kind_of(file) == "parquet":
        _open_parquet(file, text_field).close()


def documents(file: str, text_field: str) -> Iterator[Document]:
    """The documents of a file, in order; `text_field` names the text in records."""
    with reading(file):
        match kind_of(file):
            case "text":
                yield TextFile(file)
            case "jsonl":
                yield from _jsonl(file, text_field)
            case "parquet":
                yield from _parquet(file, text_field)


@dataclass(frozen=True)
class TextFile:
    """A plain text file as one document; every iteration reads it anew."""

    path: str

    def __iter__(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset = 0
        with reading(self.path), open(regular_file(self.path), "rb") as file:
            while True:
                block = file.read(BLOCK)
                nul = block.find(b"\0")
                if nul >= 0:
                    raise InputError(
                        f"{self.path} is binary: NUL at byte {offset + nul}; "
                        "leave it out, or convert it to UTF-8 if it is UTF-16"
                    )
                unfinished = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{self.path} is not UTF-8 at byte {offset - unfinished + error.start}; "
                        "leave it out, or convert it (iconv -f ... -t UTF-8)"
                    ) from None
                if text:
                    yield text
                if not block:
                    return
                offset += len(block)


def _jsonl(file: str, text_field: str) -> Iterator[Document]:
    for number, record in json_lines(file):
        if not isinstance(record, dict):
            raise InputError(f"{file}:{number} is not an object with a field '{text_field}'")
        yield (field_text(record, text_field, f"{file}:{number}"),)


def json_lines(file: str) -> Iterator[tuple[int, Any]]:
    """Reads a file of JSON lines.

    Args:
        file: The file; lines of nothing but white space are passed over.

    Yields:
        The number of each line, from 1, and its value.

    Raises:
        InputError: A line is not JSON, or has more than LARGEST_RECORD bytes.
    """
    with open(regular_file(file), "rb") as lines:
        for number in count(1):
            line = lines.readline(LARGEST_RECORD + 1)
            if not line:
                return
            if len(line) > LARGEST_RECORD:
                raise InputError(
                    f"{file}:{number} has more than {LARGEST_RECORD:,} bytes; split the record, or "
                    "write a long text as a file of plain text"
                )
            if line.isspace():
                continue
            try:
                value = strict_json.loads(line)
            except ValueError as error:
                raise InputError(f"{file}:{number} is not JSON: {error}") from None
            yield number, value


def expansion_limit(file: str) -> int:
    """The bytes that the values of a parquet file may take."""
    return max(ALWAYS_ALLOWED, MOST_EXPANSION * os.path.getsize(file))


def _open_parquet(file: str, text_field: str = "") -> Any:
    """A parquet file, whose columns of text are read as dictionaries: what repeats is held once.

    Raises InputError if it is not parquet, has no column `text_field` where that is given, or its
    values take more than `expansion_limit` by what it says itself.
    """
    import pyarrow.parquet

    regular_file(file)
    with _readable(file):
        about = pyarrow.parquet.read_metadata(file)
        columns = [about.schema.column(i) for i in range(about.num_columns)]
        # pyarrow cannot read dictionaries inside of lists and structs.
        texts = [c.path for c in columns if c.physical_type == "BYTE_ARRAY" and "." not in c.path]
        table = pyarrow.parquet.ParquetFile(file, read_dictionary=texts)
        names = table.schema_arrow.names
        nested = any("." in column.path for column in columns)
        size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        # What repeats takes no bytes in a file, and eight or more in memory.
        size = max(size, 8 * about.num_rows * (1 if text_field else len(names)))
        if nested and not text_field:
            size = max(size, 8 * _count_values(file))
    if text_field and text_field not in names:
        table.close()
        raise InputError(
            f"{file} has no column '{text_field}'; set data.text_field to one of: "
            f"{', '.join(names)}"
        )
    if size > expansion_limit(file) or max((c.path.count(".") for c in columns), default=0) > 100:
        table.close()
        raise InputError(
            f"{file} has {os.path.getsize(file):,} bytes, and its values would take {size:,}, or "
            f"are nested deeper than 100 levels; {_REMEDY}"
        )
    return table


def _count_values(file: str) -> int:
    """The number of values in all columns, where a row may hold many.

    It is read in a process of its own: where the part of the metadata that tells is damaged,
    pyarrow ends the process.
    """
    program = (
        f"import sys\nsys.path[:] = {sys.path!r}\n"
        "from pyarrow.parquet import read_metadata\n"
        "about = read_metadata(sys.argv[1])\n"
        "groups = [about.row_group(i) for i in range(about.num_row_groups)]\n"
        "print(sum(g.column(i).num_values for g in groups for i in range(g.num_columns)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program, file], capture_output=True)
    if done.returncode:
        raise ValueError("its metadata cannot be read")
    return int(done.stdout)


_REMEDY = (
    f"at most {MOST_EXPANSION} times the file's size is read, and always {ALWAYS_ALLOWED:,} bytes: "
    "if the file is right, write it as JSON lines"
)


@contextmanager
def _readable(file: str) -> Iterator[None]:
    """Turns what reading parquet raises into InputError."""
    import pyarrow

    try:
        yield
    except InputError:
        raise
    # OSError for damaged pages, ValueError for text that is not UTF-8 and dates out of range.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{file} is not parquet, or damaged: {error}; get it again, or write it again"
        ) from None


def parquet_rows(file: str, text_field: str = "") -> Iterator[dict[str, Any]]:
    """Reads a parquet file row by row.

    Args:
        file: The file.
        text_field: The one column to read; all if empty.

    Yields:
        The values of each row, by column.

    Raises:
        InputError: The file is not parquet or damaged, has no such column, or its values take
            more than `expansion_limit`.
    """
    limit, taken = expansion_limit(file), 0
    with _readable(file), _open_parquet(file, text_field) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        longest = max((g.total_byte_size // max(g.num_rows, 1) for g in groups), default=0)
        size = min(BATCH_ROWS, max(1, BATCH_BYTES // max(longest, 1)))
        if any(
            "." in table.metadata.schema.column(i).path for i in range(table.metadata.num_columns)
        ):
            size = min(size, BATCH_NESTED)
        for batch in table.iter_batches(size, columns=[text_field] if text_field else None):
            for row in range(len(batch)):
                # One at a time: a text that a dictionary holds once may be in every row.
                values = {
                    name: column[row].as_py()
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
                taken += sum(
                    VALUE_BYTES + (len(value) if isinstance(value, str | bytes | list) else 0)
                    for value in values.values()
                )
                if taken > limit:
                    raise InputError(f"the values of {file} take over {limit:,} bytes; {_REMEDY}")
                yield values


def _parquet(file: str, text_field: str) -> Iterator[Document]:
    for row, values in enumerate(parquet_rows(file, text_field)):
        yield (as_text(values[text_field], f"{file} row {row}"),)


def utf8_size(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def field_text(record: dict[str, Any], text_field: str, where: str) -> str:
    """The text of a record; `where` is named in the error if there is none."""
    if text_field not in record:
        fields = f"{', '.join(record) or 'none':.200}"
        raise InputError(
            f"{where} has no field '{text_field}'; set data.text_field to one of: {fields}"
        )
    return as_text(record[text_field], f"{where}, field '{text_field}',")


def as_text(value: Any, where: str) -> str:
    """`value` as str, decoded if it is UTF-8 bytes, and certain to be encodable."""
    try:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            if not value.isascii():
                value.encode()
            return value
    except UnicodeError as error:
        raise InputError(f"{where} is not text in UTF-8: {error}") from None
    raise InputError(f"{where} is {type(value).__name__}, not a string")
