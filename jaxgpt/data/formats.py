"""From a file to its documents: plain text, JSON, JSON lines, parquet, tables.

A document is an iterable of pieces of text that can be read more than once. A record is one piece;
a plain text file is one document, read in pieces of a mebibyte, so that it need not fit in memory.
What is not text raises InputError with the file and the place.

Whatever a file claims, it is read in bounded memory: a line of JSON lines has LARGEST_LINE
characters at most, a file that is parsed as a whole LARGEST_JSON or LARGEST_TABLE, and the values
of a parquet file, which may be compressed without measure, take no more than `expansion_limit`.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxgpt import strict_json
from jaxgpt.data.columns import column_of, match, parse_fields, spelled
from jaxgpt.data.tables import table_rows
from jaxgpt.data.textfile import TextFile, reading
from jaxgpt.errors import InputError
from jaxgpt.paths import regular_file

Document = Iterable[str]
Kind = Literal["text", "json", "jsonl", "parquet", "table"]

LARGEST_JSON = 1 << 28  # characters of a .json file, which is parsed as a whole
LARGEST_TABLE = 1 << 32  # characters of a CSV or TSV file
BATCH_ROWS, BATCH_BYTES = 1024, 1 << 26  # of a parquet file in memory at once
BATCH_NESTED = 64  # rows of columns with lists or structs, which may repeat what a file has once
MOST_EXPANSION = 100  # bytes of values for each byte of a parquet file; prose has 3 to 10
ALWAYS_ALLOWED = 1 << 30  # bytes of values of a parquet file, however small it is
VALUE_BYTES = 64  # what a value takes besides its text


def kind_of(file: str) -> Kind:
    """What a file is read as, by its suffix, of which .gz is no part.

    All that is not JSON, JSON lines, parquet or a table is text.
    """
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
    """The suffix of a file's name in lower case, without a .gz at its end."""
    return os.path.splitext(file.lower().removesuffix(".gz"))[1]


@dataclass(frozen=True)
class DocumentFile:
    """A file, and how its documents are read."""

    path: str
    kind: Kind
    column: str = ""
    """The column of the text; empty for plain text."""
    encoding: str = "utf-8"

    def documents(self) -> Iterator[Document]:
        """The documents in order; InputError at the first that is not text."""
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
        return table_rows(text, known=(self.column,), largest=LARGEST_TABLE, say=lambda line: None)

    def _text(self, record: Any, where: str) -> str:
        if isinstance(record, str) and self.kind == "json":
            return as_text(record, where)
        if not isinstance(record, dict):
            raise InputError(f"{where} is {type(record).__name__}, not an object with fields")
        return field_text(record, self.column, where)


def open_documents(file: str, fields: Sequence[str] = (), encoding: str = "utf-8") -> DocumentFile:
    """Finds how a file is read, as far as its first bytes and its first record tell.

    Args:
        file: The path.
        fields: `data.fields`: "text=COLUMN", or empty.
        encoding: The encoding of a file without a byte order mark.

    Raises:
        InputError: It is no regular file, is empty, is not text by its first bytes, or has no
            column that is clearly the text.
    """
    regular_file(file)
    if not os.path.getsize(file):
        raise InputError(f"{file} is empty; leave it out of the paths")
    kind = kind_of(file)
    given = parse_fields(fields, ("text",))
    if kind == "table" and not given:
        kind = "text"  # a table is read as it stands, unless a column is asked for
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
    """The column of the text: the one that `data.fields` names, or the one clearly meant.

    Raises:
        InputError: There is no such column.
    """
    shown = f"{', '.join(columns) or 'none':.200}"
    found, unclear = match(columns, ("text",), given=given)
    if unclear:
        one = unclear["text"][0] if unclear["text"] else "COLUMN"
        raise InputError(
            f"{path} has no column 'text', and it is not clear which of its columns is the text: "
            f"{shown}; name it: {spelled({'text': one})}"
        )
    if found["text"] not in columns:
        raise InputError(
            f"{path} has no column {found['text']!r}; set --data.fields text=COLUMN to one of: "
            f"{shown}"
        )
    return found["text"]


def json_lines(text: TextFile) -> Iterator[tuple[int, Any]]:
    """Reads a file of JSON lines.

    Args:
        text: The file; lines of nothing but white space are passed over.

    Yields:
        The number of each line, from 1, and its value.

    Raises:
        InputError: A line is not JSON, or too long.
    """
    for number, line in text.lines():
        if line.strip():
            try:
                value = strict_json.loads(line)
            except ValueError as error:
                message = f"{text.path}:{number} is not JSON: {error}"
                if line.strip() in ("[", "{"):
                    message += "; if the file is one array, name it .json"
                raise InputError(message) from None
            yield number, value


def json_values(text: TextFile) -> Iterator[tuple[int, Any]]:
    """Reads a .json file: one array, or JSON lines, as some programs call them too.

    Yields:
        The number of each value, from 0 in an array and from 1 in lines, and the value.

    Raises:
        InputError: It is neither, or too large to be parsed as a whole.
    """
    content = text.read(LARGEST_JSON, "split it, or write it as JSON lines (.jsonl)")
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
    remedy = "write a list of objects"
    lists = []
    if isinstance(values, dict):
        lists = [name for name, value in values.items() if isinstance(value, list)]
    if len(lists) == 1:
        remedy = f"write the list under {lists[0]!r} alone"
    raise InputError(
        f"{text.path} is {type(values).__name__}, not a list of objects; {remedy}, or, to train "
        "on the text of the file itself, give its name another ending, such as .txt"
    )


def _is_json(text: str) -> bool:
    try:
        strict_json.loads(text)
    except ValueError:
        return False
    return True


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
            f"{file} has no column '{text_field}'; set --data.fields text=COLUMN to one of: "
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


def utf8_size(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def field_text(record: dict[str, Any], column: str, where: str) -> str:
    """The text of a record; `where` is named in the error if there is none."""
    value = column_of(record, column)
    if value is None and column not in record:
        fields = f"{', '.join(record) or 'none':.200}"
        raise InputError(
            f"{where} has no field '{column}'; set --data.fields text=COLUMN to one of: {fields}"
        )
    return as_text(value, f"{where}, field '{column}',")


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
