"""Runs the command line: `python -m diffoc COMMAND`."""

import sys
from io import TextIOWrapper

from diffoc.commands.main import main

if __name__ == "__main__":
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has no such letters
    sys.exit(main())
