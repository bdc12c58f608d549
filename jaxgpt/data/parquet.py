"""Reads the rows of Parquet files, whose values take at most `expansion_limit` bytes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxgpt.data.rows import VALUE_BYTES, ReadOptions, Row
from jaxgpt.errors import InputError
from jaxgpt.paths import regular_file

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

BATCH_ROWS, BATCH_BYTES = 1024, 1 << 26  # maximum of a Parquet file in memory at once
BATCH_NESTED = 64  # the same with lists or structs, whose values may share storage in the file
MOST_EXPANSION = 100  # maximum bytes of values per byte of a Parquet file; prose has 3 to 10
ALWAYS_ALLOWED = 1 << 30  # bytes of values that any Parquet file may have, however small it is


def read_parquet(file: str, options: ReadOptions) -> Iterator[Row]:
    """Reads a Parquet file row by row, and only the column that is needed.

    Yields:
        The number of each row, counted from 0, and its values by column.

    Raises:
        InputError: The file is not Parquet or is damaged, lacks the column, or its values take
            more than `expansion_limit`.
    """
    limit, taken, number = expansion_limit(file), 0, 0
    with _readable(file), _open(file, options.column) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        longest = max((g.total_byte_size // max(g.num_rows, 1) for g in groups), default=0)
        size = min(BATCH_ROWS, max(1, BATCH_BYTES // max(longest, 1)))
        schema = table.metadata.schema
        if any("." in schema.column(i).path for i in range(table.metadata.num_columns)):
            size = min(size, BATCH_NESTED)
        for batch in table.iter_batches(size, columns=[options.column] if options.column else None):
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
                yield number, values
                number += 1


def parquet_columns(file: str) -> list[str]:
    """Returns the columns of a Parquet file; raises InputError if it is not one."""
    import pyarrow.parquet

    with _readable(file):
        return pyarrow.parquet.read_schema(file).names


def expansion_limit(file: str) -> int:
    """Returns the maximum number of bytes that the values of a Parquet file may take."""
    return max(ALWAYS_ALLOWED, MOST_EXPANSION * os.path.getsize(file))


def _open(file: str, column: str = "") -> "ParquetFile":
    """Opens a Parquet file with text columns read as dictionaries, which store each value once.

    Raises:
        InputError: The file is not Parquet, lacks the column, or its values take more than
            `expansion_limit` according to its metadata.
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
        nested = any("." in each.path for each in columns)
        size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        # A repeated value may take no space in the file, but takes at least 8 bytes in memory.
        size = max(size, 8 * about.num_rows * (1 if column else len(names)))
        if nested and not column:
            size = max(size, 8 * _count_values(file))
    if column and column not in names:
        table.close()
        raise InputError(
            f"{file} has no column '{column}'; set --data.fields text=COLUMN to one of: "
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
