"""The console script: ``ellq`` and ``python -m ellq``."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress


def main() -> None:
    """Run the command line on this process's arguments and exit with its status."""
    try:
        from ellq.cli import run  # here, so that Ctrl-C while it loads is met too

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("ellq: interrupted; no file is half-written", file=sys.stderr)
        status = 130
    if status == 130:
        _leave_interrupted()
    sys.exit(status)


def _leave_interrupted() -> None:
    """Exit with 130, where ``python -m`` would end by a signal if Ctrl-C had struck inside ``exec`` of a string."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(130)


if __name__ == "__main__":
    main()
