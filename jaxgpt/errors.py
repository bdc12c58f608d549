"""The exceptions of this package: invalid input, and runs that cannot continue."""


class InputError(ValueError):
    """The user's input is invalid, which is found before any device work.

    The message says what was passed, why it is invalid and what to use instead. `train.py` and the
    command line print it as one line and exit with status 2; the HTTP API answers with status 400
    and the field as `param`; in a notebook it is a ValueError.

    Args:
        message: The message.
        field: The name of the invalid option or argument, with the names of the options that
            contain it, such as `optim.learning_rate`; None: it is not about one field.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def __str__(self) -> str:
        """The message; it begins with the field if it does not mention it."""
        message = super().__str__()
        return message if not self.field or self.field in message else f"{self.field}: {message}"


class TrainingError(RuntimeError):
    """A run cannot continue, for example because the disk is full.

    The message says what happened, at which step, and which checkpoint to resume from.
    """


class Diverged(TrainingError):
    """Training has diverged, for example to a loss of NaN, so its parameters are not saved."""
