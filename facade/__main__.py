"""The console script: ``ellq`` and ``python -m ellq``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line on this process's arguments and exit with its status."""
    try:
        from ellq.cli import run  # here, so that Ctrl-C while it loads is met too

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("ellq: interrupted; no file is half-written", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
