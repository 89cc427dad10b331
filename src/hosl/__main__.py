"""`python -m hosl`: the `hosl` command, where it is not on the path."""

import sys

from hosl.cli import command

if __name__ == "__main__":
    sys.exit(command())
