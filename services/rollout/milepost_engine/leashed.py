"""Becomes another module, and dies with its launcher: `python -m milepost_engine.leashed PID MODULE ...`.

The kernel is asked to kill this process when the launcher ends, however that ends; the request outlives the
`exec` that follows. SGLang's own children ask the same of SGLang, so nothing of the tree is left on the GPU.
"""

from __future__ import annotations

import os
import signal
import sys

from milepost_common.process import die_with_parent


def main() -> None:
    """Takes the leash, then executes `python -m MODULE ...`."""
    launcher, module, *rest = sys.argv[1:]
    die_with_parent(signal.SIGKILL, parent=int(launcher))
    os.execv(sys.executable, [sys.executable, "-m", module, *rest])


if __name__ == "__main__":
    main()
