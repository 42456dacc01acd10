"""`python -m milepost_trainer serve|sft|bench [--config FILE] [--key value ...]`

`serve` is the trainer, `sft` a warm start, `bench` says how fast the trainer's step is here.

Settings are read before torch is imported, so that a wrong one is refused at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from milepost_common.process import run
from milepost_common.settings import load_or_exit
from milepost_trainer.launch import exit_at_once, is_rank, launch, leave_status, speak_nccl_as_engines_do
from milepost_trainer.settings import TrainerSettings

USAGE = "usage: python -m milepost_trainer serve|sft|bench [--config FILE] [--key value ...]"


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    if not argv or argv[0] not in _COMMANDS:
        print(USAGE, file=sys.stderr)
        return 2
    settings = load_or_exit(TrainerSettings, argv[1:])
    if settings.nproc > 1 and not is_rank():
        return launch(argv, nproc=settings.nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
    if settings.publish.transport == "nccl":
        speak_nccl_as_engines_do()
    try:
        code = _COMMANDS[argv[0]](settings)
    except Exception:
        logging.getLogger(__name__).exception("the trainer failed")
        code = 1
    leave_status(code)
    return code


def _serve(settings: TrainerSettings) -> int:
    from milepost_trainer.service import serve

    return run(
        "trainer",
        lambda stop: serve(settings, stop),
        telemetry=settings.telemetry,
        stop_deadline_s=settings.shutdown_timeout_s,
    )


def _sft(settings: TrainerSettings) -> int:
    from milepost_trainer.sft import train

    return run(
        "sft",
        lambda stop: train(settings, stop),
        telemetry=settings.telemetry,
        stop_deadline_s=settings.shutdown_timeout_s,
    )


def _bench(settings: TrainerSettings) -> int:
    from milepost_trainer.bench.run import bench

    return run(
        "bench",
        lambda stop: bench(settings, stop),
        telemetry=settings.telemetry,
        stop_deadline_s=settings.shutdown_timeout_s,
    )


_COMMANDS = {"serve": _serve, "sft": _sft, "bench": _bench}


if __name__ == "__main__":
    exit_at_once(main(sys.argv[1:]))
