"""Reads the documents of a file: plain text, JSON, JSON Lines, Parquet, CSV and TSV.

A document is an iterable of pieces of text that can be read more than once. A record is one piece;
a plain text file is one document, read in pieces of a mebibyte, so that it need not fit in memory.
Anything that is not text raises InputError with the file and the position.

Memory is bounded even for a malicious file: a line of JSON Lines has at most LARGEST_LINE
characters, a file that is parsed as a whole at most LARGEST_JSON or LARGEST_TABLE, and the
decompressed values of a Parquet file at most `expansion_limit` bytes.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxgpt import strict_json
from jaxgpt.data.columns import column_of, fields_option, match_columns, parse_fields
from jaxgpt.data.tables import table_rows
from jaxgpt.data.textfile import TextFile, reading
from jaxgpt.errors import InputError
from jaxgpt.paths import regular_file

Document = Iterable[str]
Kind = Literal["text", "json", "jsonl", "parquet", "table"]

LARGEST_JSON = 1 << 28  # maximum characters of a .json file, which is parsed as a whole
LARGEST_TABLE = 1 << 32  # maximum characters of a CSV or TSV file
BATCH_ROWS, BATCH_BYTES = 1024, 1 << 26  # maximum of a Parquet file in memory at once
BATCH_NESTED = 64  # the same with lists or structs, whose values may share storage in the file
MOST_EXPANSION = 100  # maximum bytes of values per byte of a Parquet file; prose has 3 to 10
ALWAYS_ALLOWED = 1 << 30  # bytes of values that any Parquet file may have, however small it is
VALUE_BYTES = 64  # estimated memory overhead of a Python value


def kind_of(file: str) -> Kind:
    """Returns the format of a file by its suffix, ignoring .gz; unknown suffixes are text."""
    suffixes: dict[str, Kind] = {
        ".json": "json",
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".parquet": "parquet",
        ".csv": "table",
        ".tsv": "table",
    }
    return suffixes.get(suffix_of(file), "text")


def suffix_of(file: str) -> str:
    """Returns the suffix of a file's name in lower case, ignoring a .gz at its end."""
    return os.path.splitext(file.lower().removesuffix(".gz"))[1]


@dataclass(frozen=True)
class DocumentFile:
    """A file, its format, and the column and encoding of its text."""

    path: str
    kind: Kind
    column: str = ""
    """The column that has the text; empty for plain text."""
    encoding: str = "utf-8"

    def documents(self) -> Iterator[Document]:
        """Yields the documents in order; raises InputError at the first one that is not text."""
        with reading(self.path):
            text = TextFile(self.path, self.encoding)
            match self.kind:
                case "text":
                    yield text
                case "parquet":
                    for row, values in enumerate(parquet_rows(self.path, self.column)):
                        yield (as_text(values[self.column], f"{self.path} row {row}"),)
                case _:
                    for number, record in self._records():
                        yield (self._text(record, f"{self.path}:{number}"),)

    def _records(self) -> Iterator[tuple[int, Any]]:
        text = TextFile(self.path, self.encoding)
        if self.kind == "json":
            return json_values(text)
        if self.kind == "jsonl":
            return json_lines(text)
        return table_rows(text, known=(self.column,), largest=LARGEST_TABLE, note=lambda line: None)

    def _text(self, record: Any, where: str) -> str:
        if isinstance(record, str) and self.kind == "json":
            return as_text(record, where)
        if not isinstance(record, dict):
            raise InputError(f"{where} is {type(record).__name__}, not an object with named fields")
        return field_text(record, self.column, where)


def open_documents(file: str, fields: Sequence[str] = (), encoding: str = "utf-8") -> DocumentFile:
    """Detects the format, text column and encoding of a file from its first bytes and record.

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
    kind = kind_of(file)
    given = parse_fields(fields, ("text",))
    if kind == "table" and not given:
        kind = "text"  # without a column to read, a table is read as plain text
    if kind != "parquet":
        encoding = TextFile(file, encoding).detect_encoding()
    if kind == "text":
        return DocumentFile(file, kind, encoding=encoding)
    column = given.get("text", "")
    if kind == "parquet":
        import pyarrow.parquet

        with _readable(file):
            columns = pyarrow.parquet.read_schema(file).names
        column = text_column(file, columns, given)
        _open_parquet(file, column).close()
        return DocumentFile(file, kind, column)
    first = next(DocumentFile(file, kind, column, encoding)._records(), (0, None))[1]
    columns = list(first) if isinstance(first, dict) else [column or "text"]
    if column_of(first, column) is not None:
        columns.append(column)
    return DocumentFile(file, kind, text_column(file, columns, given), encoding)


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


def json_lines(text: TextFile) -> Iterator[tuple[int, Any]]:
    """Reads a JSON Lines file, skipping blank lines.

    Yields:
        The number of each line, counted from 1, and its value.

    Raises:
        InputError: A line is not JSON, or is too long.
    """
    for number, line in text.lines():
        if line.strip():
            try:
                value = strict_json.loads(line)
            except ValueError as error:
                message = f"{text.path}:{number} is not JSON: {error}"
                if line.strip() in ("[", "{"):
                    message += "; if the file is one JSON array, rename it to .json"
                raise InputError(message) from None
            yield number, value


def json_values(text: TextFile) -> Iterator[tuple[int, Any]]:
    """Reads a .json file, which has one array or, as some programs write it, JSON Lines.

    Yields:
        The number of each value, counted from 0 in an array and from 1 in lines, and the value.

    Raises:
        InputError: The file has neither form, or is too large to be parsed as a whole.
    """
    content = text.read(LARGEST_JSON, "split it, or convert it to JSON Lines (.jsonl)")
    try:
        values = strict_json.loads(content)
    except ValueError as error:
        lines = content.split("\n", 1)
        if len(lines) > 1 and _is_json(lines[0]):
            yield from json_lines(text)
            return
        raise InputError(f"{text.path} is not JSON: {error}") from None
    if isinstance(values, list):
        yield from enumerate(values)
        return
    remedy = "use a list of objects"
    lists = []
    if isinstance(values, dict):
        lists = [name for name, value in values.items() if isinstance(value, list)]
    if len(lists) == 1:
        remedy = f"keep only the list under {lists[0]!r}"
    raise InputError(
        f"{text.path} is {type(values).__name__}, not a list of objects; {remedy}, or, to train "
        "on the text of the file itself, rename it with another suffix, such as .txt"
    )


def _is_json(text: str) -> bool:
    try:
        strict_json.loads(text)
    except ValueError:
        return False
    return True


def expansion_limit(file: str) -> int:
    """Returns the maximum number of bytes that the values of a Parquet file may take."""
    return max(ALWAYS_ALLOWED, MOST_EXPANSION * os.path.getsize(file))


def _open_parquet(file: str, text_field: str = "") -> Any:
    """Opens a Parquet file with text columns read as dictionaries, which store each value once.

    Raises:
        InputError: The file is not Parquet, lacks the column `text_field`, or its values take more
            than `expansion_limit` according to its metadata.
    """
    import pyarrow.parquet

    regular_file(file)
    with _readable(file):
        about = pyarrow.parquet.read_metadata(file)
        columns = [about.schema.column(i) for i in range(about.num_columns)]
        # pyarrow cannot read dictionaries inside lists and structs.
        texts = [c.path for c in columns if c.physical_type == "BYTE_ARRAY" and "." not in c.path]
        table = pyarrow.parquet.ParquetFile(file, read_dictionary=texts)
        names = table.schema_arrow.names
        nested = any("." in column.path for column in columns)
        size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        # A repeated value may take no space in the file, but takes at least 8 bytes in memory.
        size = max(size, 8 * about.num_rows * (1 if text_field else len(names)))
        if nested and not text_field:
            size = max(size, 8 * _count_values(file))
    if text_field and text_field not in names:
        table.close()
        raise InputError(
            f"{file} has no column '{text_field}'; set --data.fields text=COLUMN to one of: "
            f"{', '.join(names)}"
        )
    if size > expansion_limit(file) or max((c.path.count(".") for c in columns), default=0) > 100:
        table.close()
        raise InputError(
            f"{file} has {os.path.getsize(file):,} bytes, but its values would take {size:,}, or "
            f"are nested deeper than 100 levels; {_REMEDY}"
        )
    return table


def _count_values(file: str) -> int:
    """Returns the number of values in all columns, of which a row may have many.

    It is read in a subprocess, because pyarrow aborts the process if this metadata is damaged.
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
    f"the limit is {MOST_EXPANSION} times the size of the file, or {ALWAYS_ALLOWED:,} bytes if "
    "that is more; if the file is correct, convert it to JSON Lines"
)


@contextmanager
def _readable(file: str) -> Iterator[None]:
    """Converts the errors of reading Parquet to InputError."""
    import pyarrow

    try:
        yield
    except InputError:
        raise
    # OSError for damaged pages, ValueError for text that is not UTF-8 and dates out of range.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{file} is not Parquet, or is damaged: {error}; download or write it again"
        ) from None


def parquet_rows(file: str, text_field: str = "") -> Iterator[dict[str, Any]]:
    """Reads a Parquet file row by row.

    Args:
        file: The path.
        text_field: The only column to read; all columns if empty.

    Yields:
        The values of each row, by column.

    Raises:
        InputError: The file is not Parquet or is damaged, lacks the column, or its values take
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
                # One row at a time: a long text in a dictionary may be repeated in every row.
                values = {
                    name: column[row].as_py()
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
                taken += sum(
                    VALUE_BYTES + (len(value) if isinstance(value, str | bytes | list) else 0)
                    for value in values.values()
                )
                if taken > limit:
                    raise InputError(
                        f"the values of {file} take more than {limit:,} bytes; {_REMEDY}"
                    )
                yield values


def utf8_size(text: str) -> int:
    """Returns the number of bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def field_text(record: dict[str, Any], column: str, where: str) -> str:
    """Returns the text in a column of a record; raises InputError naming `where` without one."""
    value = column_of(record, column)
    if value is None and column not in record:
        fields = f"{', '.join(record) or 'none':.200}"
        raise InputError(
            f"{where} has no field '{column}'; set --data.fields text=COLUMN to one of: {fields}"
        )
    return as_text(value, f"{where}, field '{column}',")


def as_text(value: Any, where: str) -> str:
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
