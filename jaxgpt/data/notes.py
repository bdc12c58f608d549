"""Lines for the user about the data."""

import sys


def print_note(line: str) -> None:
    """Prints a line about the data to stderr."""
    print(f"data: {line}", file=sys.stderr)
