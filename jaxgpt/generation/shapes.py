"""Sizes of arrays, rounded up so that programs are compiled for few shapes."""


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least the number and at least `least`."""
    return max(least, 1 << (number - 1).bit_length())
