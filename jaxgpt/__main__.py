"""`python -m jaxgpt`."""

import signal
import sys

if __name__ == "__main__":
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:
        # While jax is imported, Python's own handler of Ctrl-C may be ignored, or crash.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:2] == ["doctor"]:  # it works where jax cannot be imported, and says so
        from jaxgpt.diagnosis import main
    else:
        from jaxgpt.cli import main
    from jaxgpt.signals import end_if_abandoned
    from jaxgpt.terminal import open_missing_streams

    open_missing_streams()
    signal.signal(signal.SIGINT, handler)
    status = main(sys.argv[1:])
    end_if_abandoned(status)
    sys.exit(status)
