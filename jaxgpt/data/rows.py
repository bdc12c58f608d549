"""What the readers of data formats have in common: rows, and how to read them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Row = tuple[int, object]
"""The number of a row or line in its file, for error messages, and its value: a dict of columns, or
any other value of JSON, which is then refused."""

VALUE_BYTES = 64  # estimated memory overhead of a Python value


@dataclass(frozen=True)
class ReadOptions:
    """How to read the rows of a file; a reader ignores the options that its format lacks."""

    encoding: str = "utf-8"
    """The encoding of text without a byte order mark."""
    column: str = ""
    """The only column that is needed; empty: all."""
    names: Sequence[str] = ()
    """The names of the columns of a table without a header."""
    fields: Sequence[str] = ()
    """The fields that the objective reads, which help to detect a header. If empty, the first line
    is the header."""
    known: Sequence[str] = ()
    """Columns that the user has named in another option."""
    allow_nul: bool = False
    """Whether the cells of a table may have NUL characters."""
    note: Callable[[str], None] = lambda line: None
    """Called with notes for the user about how the file was read."""
