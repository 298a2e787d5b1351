"""Runs the command line: `python -m diffoc COMMAND`."""

import sys

from diffoc.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
