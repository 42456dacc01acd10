"""Several ranks on one host: starts torchrun on this same command and passes signals and the exit status on.

    milepost trainer serve (nproc = 4) --> torchrun --nproc-per-node=4 -m milepost_trainer serve --> 4 ranks

torchrun sets RANK and the like; a process that finds them is a rank and launches nothing. No torch here. When
a stop was asked for, torchrun reports its own death by signal whatever the ranks did, so rank 0 leaves its
status in a file that only these two know.

Nobody outlives its owner: torchrun is told to stop when the launcher is gone, however that went, and the
ranks are killed when torchrun is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from milepost_common.process import die_with_parent, follow_parent

STATUS_FILE = "MILEPOST_TRAINER_STATUS_FILE"


def is_rank() -> bool:
    """True in a process that torchrun started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def exit_at_once(code: int) -> NoReturn:
    """End this process without the interpreter's shutdown, after flushing its output.

    gloo's threads sometimes abort in that shutdown, which would turn a clean end into a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def speak_nccl_as_engines_do() -> None:
    """Set what SGLang sets for itself, unless it is set: ranks that differ in it form no communicator.

    NCCL reads its environment once, when it forms the first one.
    """
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")


def leave_status(code: int) -> None:
    """Rank 0 notes its exit status for the launcher."""
    path = os.environ.get(STATUS_FILE, "")
    if path and os.environ.get("RANK") == "0":
        Path(path).write_text(str(code))


def launch(argv: Sequence[str], *, nproc: int) -> int:
    """Run `python -m milepost_trainer argv` on `nproc` ranks; returns the exit status of rank 0."""
    with tempfile.TemporaryDirectory(prefix="milepost-trainer-") as folder:
        status = Path(folder) / "status"
        environment = os.environ | {
            STATUS_FILE: str(status),
            "MILEPOST_DIE_WITH_PARENT": "kill",  # a suspended rank would keep its port from the next trainer
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        # All ranks are here: they need not find this host by its name, which may be one that nobody resolves.
        here = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={nproc}"]
        torchrun = ["-m", "torch.distributed.run", *here]
        # Without the "--" torchrun takes flags of ours that look like its own.
        command = [sys.executable, *torchrun, "-m", "--", "milepost_trainer", *argv]
        child = subprocess.Popen(
            command, env=environment, preexec_fn=partial(die_with_parent, parent=os.getpid())
        )

        def pass_on(number: int, frame: FrameType | None) -> None:
            del frame
            child.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, pass_on)
        follow_parent()
        code = child.wait()
        return int(status.read_text()) if status.exists() else code or 1
