"""Reads CSV and TSV files as rows of named columns.

The first line is the header, unless `data.columns` names the columns. Columns without a name are
not read, such as the index that pandas writes first, or the empty columns that Excel adds last.
"""

import csv
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

from jaxgpt.data.columns import (
    could_be_header,
    fields_option,
    is_header,
    is_number,
    match_columns,
    suggest_columns,
)
from jaxgpt.data.rows import ReadOptions, Row
from jaxgpt.data.textfile import TextFile, nul_message
from jaxgpt.errors import InputError

SAMPLE = 1000  # number of rows used to detect a header
LARGEST_TABLE = 1 << 32  # maximum characters of a CSV or TSV file
Line = tuple[int, list[str]]  # line number and cells


def read_table(file: str, options: ReadOptions) -> Iterator[Row]:
    """Reads a CSV or TSV file: one whose suffix is .tsv or .tsv.gz is separated by tabs.

    Yields:
        The number of the last line of each row, and its cells by column.

    Raises:
        InputError: The file is not a table, has neither a header nor names for its columns, or has
            both.
    """
    columns, fields, known, note = options.names, options.fields, options.known, options.note
    text = TextFile(file, options.encoding, options.allow_nul)
    content = text.read(LARGEST_TABLE, "split the file, or convert it to JSON Lines")
    rows = _parse(file, content, note)
    first, sample = next(rows, None), list(islice(rows, SAMPLE))
    if first is None:
        return
    line, header = first
    cells = [cells for _, cells in sample]
    if "\0" in "".join(header):
        raise InputError(nul_message(f"{file}:{line}"))
    if columns:
        if is_header(header, cells, (*columns, *fields, *known)):
            _, unclear = match_columns(header, fields)
            instead = f", and {_name_fields(header, cells, fields)}" if unclear else ""
            raise InputError(
                f"{file}:{line} is a header ({_shown(header)}), but data.columns is for files "
                f"without one; remove data.columns{instead} (if the line is not a header, add one)"
            )
        names, width = list(columns), len(columns)
        sample.insert(0, first)
    else:
        names, width = [_name(cell) for cell in header], len(header)
        named = [name for name in names if name]
        expected = bool(match_columns(named, fields)[0]) or bool({*named} & {*known})
        if fields and not expected and not is_header(header, cells, fields):
            if len(header) < len(fields):
                raise InputError(
                    f"{file}:{line} has {len(header)} column ({_shown(header)}), but the fields "
                    f"{' and '.join(fields)} are required; add columns for them, with a header"
                )
            as_records = _name_columns([header, *cells], fields)
            if could_be_header(header, cells):
                raise InputError(
                    f"{file}: it is unclear whether the first line ({_shown(header)}) is a header; "
                    f"if it is, {_name_fields(header, cells, fields)}; if it is a record, use "
                    f"{as_records}"
                )
            raise InputError(
                f"{file} has no header, because its first line is a record ({_shown(header)}); "
                f"name its {len(header)} columns in order: {as_records}"
            )
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise InputError(
                f"{file}:{line} has two columns named {twice!r}; rename one of them in the file"
            )
        if not named:
            raise InputError(
                f"{file}:{line} names no column; use the first line for the names of the columns"
            )
        if all(len(row) == width + 1 for row in cells) and _is_index([row[0] for row in cells]):
            names, width = ["", *names], width + 1  # R and pandas may omit the index's name
    kept = {place: name for place, name in enumerate(names) if name}
    unread = 0
    for line, row in chain(sample, rows):
        if not columns and len(kept) > 1 and [*map(_name, row)] == [*map(_name, header)]:
            raise InputError(f"{file}:{line} repeats the header; remove the line")
        if len(row) <= max(kept) or any(cell.strip() for cell in row[width:]):
            raise InputError(
                f"{file}:{line} has {len(row)} columns, not {width} ({_shown(kept.values())}); "
                "correct the line, or quote text that contains the separator"
            )
        unread += sum(bool(row[place].strip()) for place in range(len(row)) if place not in kept)
        yield line, {name: row[place] for place, name in kept.items()}
    if len(kept) < width:
        places = ", ".join(str(place + 1) for place in range(width) if place not in kept)
        note(
            f"{file}: ignored columns without a name ({places} of {width}), which have {unread:,} "
            "non-empty cells"
        )


def _parse(file: str, text: str, note: Callable[[str], None]) -> Iterator[Line]:
    """Parses a table and yields its non-empty rows."""
    csv.field_size_limit(sys.maxsize)  # a document may have more than 131,072 characters
    if file.lower().removesuffix(".gz").endswith(".tsv"):
        if not _is_quoted(text):
            yield from ((n, line.split("\t")) for n, line in enumerate(lines_of(text), 1) if line)
            return
        separator = "\t"
    else:
        if named := re.match(r"sep=(.)\r?\n", text):  # a line that Excel understands
            text, separator = text[named.end() :], named[1]
        else:
            separator = _separator(text)
        if separator != ",":
            note(f"{file}: columns are separated by {separator!r}")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num} is not CSV: {error}") from None


def _separator(text: str) -> str:
    """Detects the separator of CSV: a comma, unless only another one splits the first line."""
    first = next(filter(str.strip, io.StringIO(text)), "")
    for separator in ",;\t|":
        cells = next(csv.reader([first], delimiter=separator), [])
        if sum(bool(cell.strip()) for cell in cells) > 1:
            return separator
    return ","


def _is_quoted(text: str) -> bool:
    """Whether a TSV file quotes cells as CSV does; otherwise quotation marks are part of the text.

    It does if the csv module can parse it, and the quoted cells are either exactly the ones that
    need quotation marks (pandas' default) or all that are not numbers. It does not if quoted cells
    would span several lines although every line by itself has the same number of cells.
    """
    if '"' not in text:
        return False
    text = text.replace("\r\n", "\n").rstrip("\n") + "\n"
    as_needed = always = True
    position = rows = 0
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True):
            for number, cell in enumerate(row, 1):
                quoted = text.startswith('"', position)
                needed = any(mark in cell for mark in '\t"\r\n') or row == [""]
                as_needed &= quoted == needed
                always &= quoted or is_number(cell)
                written = '"' + cell.replace('"', '""') + '"' if quoted else cell
                written += "\n" if number == len(row) else "\t"
                if not (as_needed or always) or not text.startswith(written, position):
                    return False
                position += len(written)
            rows += 1
    except csv.Error:
        return False
    lines = text.split("\n")[:-1]
    return rows == len(lines) or len({line.count("\t") for line in lines}) > 1


def lines_of(text: str) -> list[str]:
    """Splits text into lines, at line feeds only, unlike `str.splitlines`."""
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def _name(cell: str) -> str:
    """Returns the column name in a header's cell; empty for pandas' "Unnamed: 0" and the like."""
    name = cell.strip("\ufeff \t")
    return "" if name.startswith("Unnamed: ") else name


def _is_index(cells: list[str]) -> bool:
    """Whether the cells of a column are consecutive numbers from 0 or 1."""
    return len(cells) > 1 and any(
        cells == [*map(str, range(first, first + len(cells)))] for first in (0, 1)
    )


def _shown(cells: Iterable[str]) -> str:
    text = ", ".join(cells)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _name_fields(header: list[str], rows: list[list[str]], fields: Sequence[str]) -> str:
    """Returns a remedy that maps the columns of a header to the fields."""
    names = [_name(cell) for cell in header]
    found, unclear = match_columns([name for name in names if name], fields)
    left = [name for name in names if name and name not in found.values()]
    guess = suggest_columns(left, unclear, [dict(zip(names, row, strict=False)) for row in rows])
    return f"use {fields_option(guess)}" if guess else "use --data.fields FIELD=COLUMN"


def _name_columns(rows: list[list[str]], fields: Sequence[str]) -> str:
    """Returns the option that names the columns of a file without a header."""
    places = [str(place + 1) for place in range(len(rows[0]))]
    guess = suggest_columns(places, fields, [dict(zip(places, row, strict=False)) for row in rows])
    names = {place: field for field, place in guess.items()}
    return "--data.columns " + " ".join(names.get(place, f"column{place}") for place in places)
