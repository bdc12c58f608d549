"""Tables of text, CSV and TSV, as rows of named columns.

The first line names the columns, unless `data.columns` does. Columns without a name, such as the
index that pandas writes first or the empty ones that Excel leaves at the end, are not read.
"""

import csv
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

from jaxgpt.data.columns import could_be_header, is_header, is_number, match, spelled, suggest
from jaxgpt.data.textfile import TextFile, nul_message
from jaxgpt.errors import InputError

SAMPLE = 1000  # rows by which a header is recognised
Row = tuple[int, list[str]]  # its line, and its cells


def table_rows(
    text: TextFile,
    columns: Sequence[str] = (),
    fields: Sequence[str] = (),
    known: Sequence[str] = (),
    *,
    largest: int,
    say: Callable[[str], None],
) -> Iterator[tuple[int, dict[str, str]]]:
    """Reads a CSV or TSV file.

    Args:
        text: The file; one that ends with .tsv or .tsv.gz is separated by tabs.
        columns: The names of the columns of a file without a header.
        fields: The fields that the rows are read for, by which a header is recognised; if empty,
            the first line is the header.
        known: The names of columns that the user says there are.
        largest: Characters of the largest file that is read.
        say: Gets what a user should know of how the file was read.

    Yields:
        The number of the last line of each row, and its cells by column.

    Raises:
        InputError: The file is not a table, has no header and no `columns`, or has both.
    """
    file = text.path
    rows = _parse(file, text.read(largest, "split the file, or write it as JSON lines"), say)
    first, sample = next(rows, None), list(islice(rows, SAMPLE))
    if first is None:
        return
    line, header = first
    cells = [cells for _, cells in sample]
    if "\0" in "".join(header):
        raise InputError(nul_message(f"{file}:{line}"))
    if columns:
        if is_header(header, cells, (*columns, *fields, *known)):
            _, unclear = match(header, fields)
            instead = f", and {_name_fields(header, cells, fields)}" if unclear else ""
            raise InputError(
                f"{file}:{line} is a header ({_shown(header)}), which data.columns would make a "
                f"record; leave data.columns out{instead} (if it is no header, add one to the file)"
            )
        names, width = list(columns), len(columns)
        sample.insert(0, first)
    else:
        names, width = [_name(cell) for cell in header], len(header)
        named = [name for name in names if name]
        expected = bool(match(named, fields)[0]) or bool({*named} & {*known})
        if fields and not expected and not is_header(header, cells, fields):
            if len(header) < len(fields):
                raise InputError(
                    f"{file}:{line} has {len(header)} column ({_shown(header)}), and "
                    f"{' and '.join(fields)} are to be read; begin the file with a line that names "
                    "them"
                )
            as_records = _name_columns([header, *cells], fields)
            if could_be_header(header, cells):
                raise InputError(
                    f"{file}: it is not clear whether the first line ({_shown(header)}) is a "
                    f"header; if it is, {_name_fields(header, cells, fields)}; if it is a record, "
                    f"type {as_records}"
                )
            raise InputError(
                f"{file} has no header: its first line is a record ({_shown(header)}); name its "
                f"{len(header)} columns in order: {as_records}"
            )
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise InputError(
                f"{file}:{line} names two columns {twice!r}; rename one of them in the file"
            )
        if not named:
            raise InputError(f"{file}:{line} names no column; write their names in the first line")
        if all(len(row) == width + 1 for row in cells) and _is_index([row[0] for row in cells]):
            names, width = ["", *names], width + 1  # R and pandas may leave out the index's name
    kept = {place: name for place, name in enumerate(names) if name}
    unread = 0
    for line, row in chain(sample, rows):
        if not columns and len(kept) > 1 and [*map(_name, row)] == [*map(_name, header)]:
            raise InputError(f"{file}:{line} is the header once more; remove the line")
        if len(row) <= max(kept) or any(cell.strip() for cell in row[width:]):
            raise InputError(
                f"{file}:{line} has {len(row)} columns, and there are {width}: "
                f"{_shown(kept.values())}; correct it, or quote a text that holds the separator"
            )
        unread += sum(bool(row[place].strip()) for place in range(len(row)) if place not in kept)
        yield line, {name: row[place] for place, name in kept.items()}
    if len(kept) < width:
        places = ", ".join(str(place + 1) for place in range(width) if place not in kept)
        say(
            f"{file}: columns without a name are not read ({places} of {width}; {unread:,} of "
            "their cells are not empty)"
        )


def _parse(file: str, text: str, say: Callable[[str], None]) -> Iterator[Row]:
    """The rows of a table that are not empty."""
    csv.field_size_limit(sys.maxsize)  # a document may have more than 131,072 characters
    if file.lower().removesuffix(".gz").endswith(".tsv"):
        if not _is_quoted(text):
            yield from ((n, line.split("\t")) for n, line in enumerate(lines_of(text), 1) if line)
            return
        separator = "\t"
    else:
        if named := re.match(r"sep=(.)\r?\n", text):  # Excel's own line
            text, separator = text[named.end() :], named[1]
        else:
            separator = _separator(text)
        if separator != ",":
            say(f"{file}: columns are separated by {separator!r}")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num} is not CSV: {error}") from None


def _separator(text: str) -> str:
    """The separator of CSV, by its first line: a comma, unless only another one splits it."""
    first = next(filter(str.strip, io.StringIO(text)), "")
    for separator in ",;\t|":
        cells = next(csv.reader([first], delimiter=separator), [])
        if sum(bool(cell.strip()) for cell in cells) > 1:
            return separator
    return ","


def _is_quoted(text: str) -> bool:
    """Whether a TSV file quotes cells as CSV does.

    It does if csv reads it, and exactly the cells that need quotation marks have them (pandas'
    default), or all that are not numbers have them. Otherwise, or if every line has as many cells
    by itself, a quotation mark is part of a text.
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
    """The lines of a text; other than `splitlines`, at line feeds alone."""
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def _name(cell: str) -> str:
    """The name of a column, empty for one that pandas named because it had none."""
    name = cell.strip("\ufeff \t")
    return "" if name.startswith("Unnamed: ") else name


def _is_index(cells: list[str]) -> bool:
    """Whether the cells of a column count the rows, from 0 or 1."""
    return len(cells) > 1 and any(
        cells == [*map(str, range(first, first + len(cells)))] for first in (0, 1)
    )


def _shown(cells: Iterable[str]) -> str:
    text = ", ".join(cells)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _name_fields(header: list[str], rows: list[list[str]], fields: Sequence[str]) -> str:
    """What to type for a file with a header."""
    names = [_name(cell) for cell in header]
    found, unclear = match([name for name in names if name], fields)
    left = [name for name in names if name and name not in found.values()]
    guess = suggest(left, unclear, [dict(zip(names, row, strict=False)) for row in rows])
    return f"type {spelled(guess)}" if guess else "name columns with --data.fields FIELD=COLUMN"


def _name_columns(rows: list[list[str]], fields: Sequence[str]) -> str:
    """What to type for a file without a header."""
    places = [str(place + 1) for place in range(len(rows[0]))]
    guess = suggest(places, fields, [dict(zip(places, row, strict=False)) for row in rows])
    names = {place: field for field, place in guess.items()}
    return "--data.columns " + " ".join(names.get(place, f"column{place}") for place in places)
