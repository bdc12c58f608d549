"""The command `python train.py`, which is also `jaxgpt train`."""

import sys

from jaxgpt import processes
from jaxgpt.config import CONFIGS
from jaxgpt.errors import InputError, TrainingError
from jaxgpt.paths import keep_compiled_programs
from jaxgpt.signals import Signals
from jaxgpt.training import pipeline

DEFAULT = CONFIGS / "default.py"


def main(args: list[str]) -> int:
    """Trains as the command line says; returns the exit status."""
    signals = Signals()
    try:
        asked = pipeline.from_command_line(args, DEFAULT)
        asked.check()
        keep_compiled_programs()
        processes.connect(asked.parallel)  # before `signals`, because jax takes SIGTERM there
        with processes.ending_together(), signals:
            return pipeline.run(asked, signals)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 128 + signals.received if signals.received else 1
