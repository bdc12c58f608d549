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

from jaxgpt.huge_pages import restart_with_huge_pages
from jaxgpt.streams import in_kernel

if __name__ == "__main__":
    restart_with_huge_pages()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN and not in_kernel():
        # While jax is imported, Python's own handler of Ctrl-C may be ignored, or crash.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

from jaxgpt.signals import end_if_abandoned
from jaxgpt.terminal import survive_closed_output
from jaxgpt.training.command import main

if __name__ == "__main__":
    survive_closed_output()
    status = main(sys.argv[1:])
    end_if_abandoned(status)
    sys.exit(status)
