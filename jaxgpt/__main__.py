"""`python -m jaxgpt`."""

import sys

from jaxgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
