"""How results look in terminals and notebooks: tables, visible characters, and progress."""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from unicodedata import category

from jaxgpt.streams import in_kernel, is_live

MOMENT = 0.5
"""Seconds after which the progress of a call is shown."""
PAUSE = 0.2
"""Seconds between two updates of the progress in a notebook."""


def printable(text: str) -> str:
    """The text with control characters other than line breaks and tabs replaced by U+FFFD."""
    return "".join("\ufffd" if category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)


def visible(text: str) -> str:
    """The text on one line, with spaces, line breaks and tabs as visible characters."""
    return printable(text).translate({ord(" "): "\u00b7", ord("\n"): "\u21b5", ord("\t"): "\u2192"})


def shortened(text: str, most: int) -> str:
    """The text on one line, its middle replaced by an ellipsis if it has more characters."""
    text = " ".join(printable(text).split())
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - half]}\u2026{text[-half:]}"


def bytes_text(size: float) -> str:
    """A number of bytes with a unit.

    >>> bytes_text(1536), bytes_text(497_759_232)
    ('1.5 kB', '498 MB')
    """
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = next((n for n in range(4) if size < 1000 ** (n + 1)), 4)
    value = size / 1000**power
    return (
        f"{value:.0f} {units[power]}"
        if not power or value >= 100
        else f"{value:.1f} {units[power]}"
    )


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """A table for terminals.

    Args:
        rows: The cells, on one line each.
        right: The columns that are aligned to the right.
    """
    from rich.cells import cell_len  # a Chinese character takes two columns

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]

    def cell(at: int, text: str) -> str:
        space = " " * (widths[at] - cell_len(text))
        return space + text if at in right else text + space

    return "\n".join("  ".join(cell(*one) for one in enumerate(row)).rstrip() for row in rows)


def html_table(
    rows: Sequence[Sequence[str]], head: Sequence[str] = (), right: Collection[int] = ()
) -> str:
    """A table for notebooks, in HTML without scripts; the texts of the cells are escaped.

    Args:
        rows: The cells.
        head: The names of the columns; empty: the first cell of each row is its name.
        right: The columns that are aligned to the right.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        found = []
        for at, text in enumerate(cells):
            name = "th" if tag == "th" or (not head and at == 0) else "td"
            align = "right" if at in right else "left"
            found.append(f'<{name} style="text-align:{align}">{escape(printable(text))}</{name}>')
        return f"<tr>{''.join(found)}</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    return f"<table>{top}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


@contextmanager
def progress(what: str, total: int, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows how much of a long call is done: as a bar on a terminal, as a line in a notebook.

    Nothing is shown for calls that take less than `MOMENT`, nor elsewhere, as in a log file.

    Args:
        what: What is done, such as "scoring".
        total: The number of things to do.
        shown: Whether to show anything.

    Yields:
        A function to call with the number of things that were done since the last call.
    """
    if shown and in_kernel():
        with _notebook_progress(what, total) as shown_in_place:
            yield shown_in_place
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    quiet = not (shown and is_live(sys.stderr))
    bar = Progress(
        *columns,
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=quiet,
        transient=True,
    )
    task, began = bar.add_task(what, total=total), time.monotonic()

    def advance(done: int) -> None:
        bar.advance(task, done)
        if time.monotonic() - began > MOMENT:
            bar.start()  # does nothing the second time

    try:
        yield advance
    finally:
        bar.stop()


@contextmanager
def _notebook_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """`progress` as one line of text that is updated in place."""
    from IPython.display import display

    began = time.monotonic()
    handle, updated, count = None, began + MOMENT - PAUSE, 0

    def show() -> None:
        nonlocal handle
        text = f"{what}: {count:,} of {total:,}, {time.monotonic() - began:.0f} s"
        bundle = {"text/plain": text}
        if handle is None:
            handle = display(bundle, raw=True, display_id=True)
        else:
            handle.update(bundle, raw=True)

    def advance(done: int) -> None:
        nonlocal updated, count
        count += done
        if time.monotonic() - updated > PAUSE:
            updated = time.monotonic()
            show()

    yield advance
    if handle is not None:
        show()
