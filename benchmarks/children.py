"""Child processes of a benchmark: started with a deadline, killed with their parent, ended in the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from milepost_common.process import die_with_parent

START_S = 150.0
STOP_S = 60.0
STATUS_S = 5.0


class ChildFailed(Exception):
    """A child ended, or was not ready in time; the message holds the end of its log."""


class Child:
    """A child process; its stderr goes to a file.

    Attributes:
      pid: its process id.
      line: its readiness line.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process, self.log = process, log
        self.pid = process.pid
        self.line = ""

    async def ready(self, pattern: str = " ready ", *, within_s: float = START_S) -> str:
        """Waits for the first line of stdout that matches; returns the match's last group."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(within_s):
                async for raw in self._process.stdout:
                    self.line = raw.decode().strip()
                    if match := re.search(pattern, self.line):
                        return match[match.lastindex or 0]
        except TimeoutError:
            raise self.failed(f"not ready within {within_s:g} s") from None
        raise self.failed(f"ended before it was ready, exit status {await self._status()}")

    async def _status(self) -> int | None:
        """Its exit status, negative where a signal ended it; None where it has only closed its output."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), STATUS_S)
        return self._process.returncode

    def address(self, kind: str) -> str:
        """The address of that kind in the readiness line."""
        match = re.search(rf"\b{kind}=(\S+)", self.line)
        if match is None:
            raise self.failed(f"no {kind}= in {self.line!r}")
        return match[1]

    def failed(self, what: str) -> ChildFailed:
        """The error that says so, with the end of the log."""
        return ChildFailed(f"{self.log.stem}: {what}\n{self.log.read_text(errors='replace')[-2000:]}")

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL for one that does not listen."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.communicate(), STOP_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def child(
    name: str, *command: str | Path, folder: Path, environment: Mapping[str, str] | None = None
) -> AsyncGenerator[Child]:
    """Runs a command until the block ends.

    Args:
      name: of its log file.
      command: the program and its arguments.
      folder: its working directory, which gets the log.
      environment: variables besides ours.
    """
    parent = os.getpid()
    log = folder / f"{name}.log"
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *map(str, command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            cwd=folder,
            env={**clean_environment(), **(environment or {})},
            preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent=parent),
        )
    started = Child(process, log)
    try:
        yield started
    finally:
        await started.stop()


def python(module: str, *args: object) -> tuple[str, ...]:
    """The command that runs a module with this interpreter."""
    return (sys.executable, "-m", module, *map(str, args))


def clean_environment() -> dict[str, str]:
    """Our environment without settings of Milepost, which would reach the services that are measured; but
    metrics are served on free ports, so that nobody is in the way."""
    root = str(Path(__file__).resolve().parents[1])
    ours = {k: v for k, v in os.environ.items() if not k.startswith("MILEPOST_")}
    services = ("BUFFER", "ROUTER", "ROLLOUT", "TRAINER", "ENGINE")
    ports = {f"MILEPOST_{service}__METRICS_LISTEN": "127.0.0.1:0" for service in services}
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    return {**ours, **ports, "MILEPOST_DIE_WITH_PARENT": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
