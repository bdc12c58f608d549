"""Whether output is seen on a terminal, where a progress bar can be redrawn, or in a notebook."""

import os
import sys
from typing import IO


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, or was started by one, as by `!python`."""
    names = ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "JPY_PARENT_PID")
    by_backend = "inline" in os.environ.get("MPLBACKEND", "")
    return in_kernel() or by_backend or any(name in os.environ for name in names)


def in_kernel() -> bool:
    """Whether this process runs the cells of a notebook, so that ending it loses their state."""
    return "ipykernel" in sys.modules


def is_live(stream: IO[str] | None) -> bool:
    """Whether lines that were printed to a stream can be redrawn.

    A command that a notebook starts with `!` writes to a pseudo-terminal, but the notebook shows
    each drawing of a progress bar as text of its own.
    """
    try:
        is_terminal = stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False
    dumb = os.environ.get("TERM", "") in ("dumb", "unknown")
    return is_terminal and not dumb and not in_notebook()
