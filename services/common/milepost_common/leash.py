"""Becomes another program that ends with its parent: `python -I -S leash.py SIGNAL PARENT PROGRAM ...`.

The kernel is asked to send SIGNAL when the parent ends, however that ends; the request outlives the `exec`
that follows. It is a file to run and no module to import, and imports little: every start pays for it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Takes the leash, then executes the program."""
    number, parent, *command = sys.argv[1:]
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != int(parent):  # it went away before the request
            sys.exit(1)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python: the program shall not inherit that
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
