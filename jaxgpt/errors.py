"""The exceptions of this package: invalid input, and runs that cannot continue."""


class InputError(ValueError):
    """The user's input is invalid, which is found before any device work.

    The message says what was passed, why it is invalid and what to use instead. `train.py` and the
    command line print it as one line and exit with status 2; in a notebook it is a ValueError.
    """


class TrainingError(RuntimeError):
    """A run cannot continue, for example because the disk is full.

    The message says what happened, at which step, and which checkpoint to resume from.
    """


class Diverged(TrainingError):
    """Training has diverged, for example to a loss of NaN, so its parameters are not saved."""
