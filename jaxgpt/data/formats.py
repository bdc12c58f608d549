"""The data formats: how to read the rows of a file, as text and as records.

A format is a function that yields the rows of a file, and a line of `FORMATS`. Text is a column of
the rows, and each of them is one document. A file in none of the formats is plain text: one
document, read in pieces of a mebibyte, so that it need not fit in memory.

Memory is bounded even for a malicious file: by the length of a line in JSON Lines, by the size of a
file that is parsed as a whole, and by the size of the values of a Parquet file.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxgpt.data.columns import column_of, fields_option, match_columns, parse_fields
from jaxgpt.data.json_files import read_json, read_json_lines
from jaxgpt.data.parquet import parquet_columns, read_parquet
from jaxgpt.data.rows import ReadOptions, Row
from jaxgpt.data.tables import read_table
from jaxgpt.data.textfile import TextFile, reading
from jaxgpt.errors import InputError
from jaxgpt.paths import regular_file

Document = Iterable[str]
"""A text in pieces, which can be read more than once."""


@dataclass(frozen=True)
class Format:
    """A data format whose files have rows."""

    name: str
    """Part of the fingerprint of a corpus."""
    read: Callable[[str, ReadOptions], Iterator[Row]]
    """Yields the rows of a file; raises InputError with the file and the line."""
    columns: Callable[[str], list[str]] | None = None
    """Returns the columns of a binary file. None: a text file, whose first row has the columns."""
    strings: bool = False
    """Whether a row may be a string in place of named columns."""


_TABLE, _LINES = Format("table", read_table), Format("jsonl", read_json_lines)
FORMATS = {
    ".csv": _TABLE,
    ".tsv": _TABLE,
    ".json": Format("json", read_json, strings=True),
    ".jsonl": _LINES,
    ".ndjson": _LINES,
    ".parquet": Format("parquet", read_parquet, parquet_columns),
}
"""The formats by suffix."""


def format_of(file: str) -> Format | None:
    """Returns the format of a file by its suffix, ignoring .gz; None for plain text."""
    return FORMATS.get(suffix_of(file))


def is_table(file: str) -> bool:
    """Whether a file is CSV or TSV, which is also read as plain text."""
    return format_of(file) == _TABLE


def suffix_of(file: str) -> str:
    """Returns the suffix of a file's name in lower case, ignoring a .gz at its end."""
    return os.path.splitext(file.lower().removesuffix(".gz"))[1]


@dataclass(frozen=True)
class DocumentFile:
    """A file, its format, and the column and encoding of its text."""

    path: str
    format: Format | None = None
    """None: plain text."""
    column: str = ""
    """The column that has the text; empty for plain text."""
    encoding: str = "utf-8"

    def documents(self) -> Iterator[Document]:
        """Yields the documents in order; raises InputError at the first one that is not text."""
        with reading(self.path):
            if self.format is None:
                yield TextFile(self.path, self.encoding)
                return
            options = ReadOptions(self.encoding, self.column, known=(self.column,))
            for number, row in self.format.read(self.path, options):
                yield (self._text(self.format, number, row),)

    def _text(self, format: Format, number: int, row: object) -> str:
        where = f"{self.path}:{number}"
        if isinstance(row, str) and format.strings:
            return as_text(row, where)
        if not isinstance(row, dict):
            raise InputError(f"{where} is {type(row).__name__}, not an object with named fields")
        if format.columns:  # all rows have the column
            return as_text(row[self.column], f"{self.path} row {number}")
        return field_text(row, self.column, where)


def open_documents(file: str, fields: Sequence[str] = (), encoding: str = "utf-8") -> DocumentFile:
    """Detects the format, text column and encoding of a file from its first bytes and row.

    Args:
        file: The path.
        fields: The option `data.fields`: "text=COLUMN", or empty.
        encoding: The encoding of a file without a byte order mark.

    Returns:
        The file, ready to be read.

    Raises:
        InputError: The file is not a regular file, is empty, is not text, or it is ambiguous which
            of its columns has the text.
    """
    regular_file(file)
    if not os.path.getsize(file):
        raise InputError(f"{file} is empty; remove it from the paths")
    format, given = format_of(file), parse_fields(fields, ("text",))
    if format and format.columns:
        return DocumentFile(file, format, text_column(file, format.columns(file), given))
    encoding = TextFile(file, encoding).detect_encoding()
    if format is None or (is_table(file) and not given):
        return DocumentFile(file, encoding=encoding)  # a table is plain text if no column is set
    column = given.get("text", "")
    _, first = next(format.read(file, ReadOptions(encoding, column, known=(column,))), (0, None))
    columns = list(first) if isinstance(first, dict) else [column or "text"]
    if column_of(first, column) is not None:
        columns.append(column)
    return DocumentFile(file, format, text_column(file, columns, given), encoding)


def text_column(path: str, columns: Sequence[str], given: dict[str, str]) -> str:
    """Returns the column that has the text: set by `data.fields`, or guessed from its name.

    Args:
        path: The file, for error messages.
        columns: The columns of the file.
        given: The parsed option `data.fields`.

    Raises:
        InputError: The column that is set does not exist, or the column is ambiguous.
    """
    shown = f"{', '.join(columns) or 'none':.200}"
    found, unclear = match_columns(columns, ("text",), given=given)
    if unclear:
        one = unclear["text"][0] if unclear["text"] else "COLUMN"
        raise InputError(
            f"{path} has no column 'text', and it is unclear which of its columns has the text: "
            f"{shown}; set it: {fields_option({'text': one})}"
        )
    if found["text"] not in columns:
        raise InputError(
            f"{path} has no column {found['text']!r}; set --data.fields text=COLUMN to one of: "
            f"{shown}"
        )
    return found["text"]


def utf8_size(text: str) -> int:
    """Returns the number of bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def field_text(record: Mapping[str, object], column: str, where: str) -> str:
    """Returns the text in a column of a record; raises InputError naming `where` without one."""
    value = column_of(record, column)
    if value is None and column not in record:
        fields = f"{', '.join(record) or 'none':.200}"
        raise InputError(
            f"{where} has no field '{column}'; set --data.fields text=COLUMN to one of: {fields}"
        )
    return as_text(value, f"{where}, field '{column}',")


def as_text(value: object, where: str) -> str:
    """Returns a string or UTF-8 bytes as str; raises InputError if it is not valid text."""
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
