"""Being written."""

from jaxgpt.objectives.base import Objective


class Translate(Objective):
    """Being written."""
