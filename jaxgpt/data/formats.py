"""From a file to its documents: plain text, JSON lines, parquet.

A document is an iterable of pieces of text that can be read more than once. A record is one piece;
a plain text file is one document, read in pieces of a mebibyte, so that it need not fit in memory.
Text is UTF-8 and arrives as it is: no newline, byte order mark or space is changed. What is not
text raises InputError with the file and the place.
"""

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxgpt.errors import InputError

Document = Iterable[str]
Kind = Literal["text", "jsonl", "parquet"]

BLOCK = 1 << 20  # bytes of a plain text file read at a time


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
    """Raises InputError for what can be seen without reading the file: no bytes, no such column."""
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
        with reading(self.path), open(self.path, "rb") as file:
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
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                record = json.loads(line.decode())
            except ValueError as error:
                raise InputError(f"{file}:{number} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise InputError(f"{file}:{number} is not an object with a field '{text_field}'")
            yield (field_text(record, text_field, f"{file}:{number}"),)


def _open_parquet(file: str, text_field: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{file} is not parquet: {error}") from None
    if text_field not in table.schema_arrow.names:
        columns = ", ".join(table.schema_arrow.names)
        table.close()
        raise InputError(
            f"{file} has no column '{text_field}'; set data.text_field to one of: {columns}"
        )
    return table


def _parquet(file: str, text_field: str) -> Iterator[Document]:
    with _open_parquet(file, text_field) as table:
        row = 0
        for rows in table.iter_batches(batch_size=1024, columns=[text_field]):
            for value in rows.column(0).to_pylist():
                yield (as_text(value, f"{file} row {row}"),)
                row += 1


def utf8_size(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def field_text(record: dict[str, Any], text_field: str, where: str) -> str:
    """The text of a record; `where` is named in the error if there is none."""
    if text_field not in record:
        fields = ", ".join(record) or "none"
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
