"""Being written."""

from typing import Any


def decode(*args: Any, **settings: Any) -> Any:
    """Being written."""
    raise NotImplementedError
