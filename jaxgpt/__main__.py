"""`python -m jaxgpt`, and the command `jaxgpt`."""

import signal
import sys

from jaxgpt.huge_pages import restart_with_huge_pages


def run() -> None:
    """Runs the command line, and ends the process with its exit status."""
    restart_with_huge_pages()
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:
        # While jax is imported, Python's own handler of Ctrl-C may be ignored, or crash.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from jaxgpt.signals import end_if_abandoned

    if sys.argv[1:2] == ["train"]:
        from jaxgpt.terminal import survive_closed_output
        from jaxgpt.training.command import main as train

        survive_closed_output()
        status = train(sys.argv[2:])
    else:
        if sys.argv[1:2] == ["doctor"]:  # it works where jax cannot be imported, and says so
            from jaxgpt.diagnosis import main
        else:
            from jaxgpt.cli import main
        from jaxgpt.terminal import open_missing_streams

        open_missing_streams()
        signal.signal(signal.SIGINT, handler)
        status = main(sys.argv[1:])
    end_if_abandoned(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
