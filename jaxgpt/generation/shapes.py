"""Types of arrays, and sizes rounded up so that programs are compiled for few shapes."""

import jax
import numpy as np

Array = jax.Array | np.ndarray
"""An argument of a compiled program: on the device already, or still on the host."""


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least the number and at least `least`."""
    return max(least, 1 << (number - 1).bit_length())
