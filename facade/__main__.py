"""The console script: ``ellq`` and ``python -m ellq``."""

from __future__ import annotations

import sys

from ellq.cli import run


def main() -> None:
    """Run the command line on this process's arguments and exit with its status."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
