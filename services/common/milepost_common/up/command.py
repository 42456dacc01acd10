"""The command line of `milepost up`: settings, one owner a run folder, signals, exit status."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

from milepost.errors import FailedPrecondition, InvalidArgument
from milepost_common.process import follow_parent, set_up_logging
from milepost_common.settings import load
from milepost_common.up.plan import Plan, find_config, make_plan, names_config
from milepost_common.up.policy import RestartPolicy
from milepost_common.up.settings import UpSettings
from milepost_common.up.supervisor import INTERRUPTED, OK, Supervisor

USAGE = 2


def main(argv: Sequence[str]) -> int:
    """Runs everything; returns 0 when the run finished or was stopped by SIGTERM, 1 when it failed, 2 for bad
    settings, 130 after Ctrl-C."""
    set_up_logging("up")
    config = find_config(argv)
    args = [*argv, "--config", config] if config and not names_config(argv) else list(argv)
    try:
        settings = load(UpSettings, args)
        set_up_logging("up", settings.telemetry.log_format)
        plan = make_plan(settings, config=config)
        with _owner_of(plan.run_dir):
            return asyncio.run(_supervise(settings, plan, config))
    except InvalidArgument as error:
        print(f"milepost up: {error}", file=sys.stderr)
        return USAGE
    except FailedPrecondition as error:
        print(f"milepost up: {error}", file=sys.stderr)
        return 1


async def _supervise(settings: UpSettings, plan: Plan, config: str) -> int:
    supervisor = Supervisor(
        plan.specs,
        run_dir=plan.run_dir,
        policy=RestartPolicy(crash_limit=settings.crash_limit),
        report=lambda line: print(line, flush=True),
        about={"run_id": plan.run_id, "run_dir": str(plan.run_dir), "config": config},
        stay=settings.stay,
    )
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, supervisor.interrupt, INTERRUPTED)
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, supervisor.interrupt, OK)
    follow_parent()
    print(
        f"run {plan.run_id} in {plan.run_dir}; logs in {plan.run_dir / 'logs'}; Ctrl-C stops all", flush=True
    )
    code = await supervisor.run()
    print(f"run {plan.run_id}: {_VERDICTS.get(code, 'stopped')}", flush=True)
    return code


_VERDICTS = {0: "all stopped", 1: "failed, all stopped", INTERRUPTED: "interrupted, all stopped"}


@contextlib.contextmanager
def _owner_of(run_dir: Path) -> Generator[None]:
    """Holds the run folder's lock; the kernel lets go of it however this process ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FailedPrecondition(
            f"run_dir = {run_dir}: another `milepost up` owns it; stop that one or choose another folder"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
