"""Train a GPT: pretraining and every kind of fine-tuning, as a config file and options say.

    python train.py                                          # the embedded default
    python train.py configs/shakespeare_cpu.py --data.paths tinyshakespeare.txt
    python train.py configs/shakespeare_cpu.py --help        # every option
    python train.py configs/chatgpt.py                       # several runs: base, instruct, reward

Running the same command again resumes from the last checkpoint, exactly. The training loop itself
is in `jaxgpt/training/loop.py`.
"""

import signal
import sys

if (
    __name__ == "__main__"
    and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    and "ipykernel" not in sys.modules  # under %run, where this would end the notebook's kernel
):
    # While jax is imported, Python's own handler of Ctrl-C may be ignored, or crash.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from pathlib import Path

from jaxgpt import processes
from jaxgpt.errors import InputError, TrainingError
from jaxgpt.paths import keep_compiled_programs
from jaxgpt.signals import Signals, end_if_abandoned
from jaxgpt.terminal import survive_closed_output
from jaxgpt.training import pipeline

DEFAULT = Path(__file__).parent / "configs" / "default.py"


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


if __name__ == "__main__":
    survive_closed_output()
    status = main(sys.argv[1:])
    end_if_abandoned(status)
    sys.exit(status)
