"""The one error that says: the input is wrong, not the program."""


class InputError(ValueError):
    """Bad input, found before any device work.

    The message says what was given, why it cannot be, and what to set instead. `train.py` and the
    command line print it as one line and exit with status 2; in a notebook it is a ValueError.
    """


class TrainingError(RuntimeError):
    """A run that cannot go on: a loss that is not finite, a disk that is full.

    The message says what happened, at which step, and which checkpoint is good.
    """


class Diverged(TrainingError):
    """Training has diverged: its newest parameters are not worth saving."""
