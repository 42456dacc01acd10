"""A service as a child process: its readiness line, its own children, and its end."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

START_S = 100.0
DRIVER = """
import sys
from milepost_common import process
from milepost_engine.launcher import Launcher
from milepost_engine.settings import from_command_line

port, *flags = sys.argv[1:]
settings = from_command_line(["--backend", "sglang", *flags])
arguments = ["--model", str(settings.model), "--port", port, "--host", settings.host]
arguments += ["--metrics_listen", "127.0.0.1:0"]
server = {"module": "milepost_engine", "arguments": arguments, "port": int(port), "release": "0.5.21"}
launcher = Launcher(settings, **server, gpu_uuids=("GPU-1",))
sys.exit(process.run("engine", launcher.run, stop_deadline_s=settings.shutdown_timeout_s))
"""
"""A launcher with an engine of ours where SGLang would be: `python -c DRIVER PORT --model DIR ...`."""


class Launched:
    """A child process; its log takes what it prints beside the readiness line.

    Args:
      log: file for its standard error.
      argv: what Python is to run.
      environ: variables beside ours.
      start_s: how long it may take to be ready.
    """

    def __init__(
        self, log: Path, *argv: str, environ: dict[str, str] | None = None, start_s: float = START_S
    ) -> None:
        self.log, self._start_s = log, start_s
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *argv],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})},
            )
        self.servers: set[int] = set()

    def ready(self) -> str:
        """Its readiness line; empty when it ended instead."""
        deadline = threading.Timer(self._start_s, self.process.kill)
        deadline.start()
        try:
            assert self.process.stdout is not None
            return self.process.stdout.readline().strip()
        finally:
            deadline.cancel()

    def address(self, line: str, kind: str) -> str:
        """The address of that kind in a readiness line."""
        match = re.search(rf"{kind}=(\S+)", line)
        assert match, f"{line!r}\n{self.log.read_text()[-3000:]}"
        return match[1]

    def server(self) -> int:
        """The process id of the server it launched."""
        (pid,) = self.children()
        self.servers.add(pid)
        return pid

    def children(self) -> list[int]:
        """What it has launched and not buried."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self) -> None:
        """Kills it, and what it launched, if that lives on."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=30)
        for pid in self.servers:
            if runs(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self.process.stdout:
            self.process.stdout.close()


def runs(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def group_of(pid: int) -> list[int]:
    """The processes of a process group that run."""
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid and fields[0] not in ("Z", "X"):
            found.append(int(stat.parent.name))
    return found


_given: set[int] = set()


def free_port() -> str:
    """A port that nobody listens on, and that nobody gets by chance while it is not in use.

    It lies below those that the kernel gives to who asks for port 0, or connects; and no two calls of one
    process answer the same.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, lowest if lowest > 12_000 else 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return str(port)
