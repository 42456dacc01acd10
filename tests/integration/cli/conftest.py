"""Waiting with a deadline, and processes that never outlive their test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launched import free_port
from milepost import BufferClient
from milepost_common.up.readiness import parse_readiness

DEADLINE_S = 60.0
STAND_IN = Path(__file__).with_name("stand_in.py")


async def until(condition: Callable[[], Any], *, what: str = "", deadline_s: float = DEADLINE_S) -> Any:
    """Polls a condition until it is true; returns its value."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {deadline_s:.0f} s in vain: {what or condition}"
        await asyncio.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    """True while there is such a process, and it is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_with_children(pid: int) -> list[psutil.Process]:
    """Ends a process and its whole tree at once; returns its children."""
    process = psutil.Process(pid)
    children = process.children(recursive=True)
    for each in (process, *children):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    return children


Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts programs; whatever still runs at the end of the test is killed with all its children."""
    running: list[asyncio.subprocess.Process] = []

    async def start_one(*command: str | Path, **options: Any) -> asyncio.subprocess.Process:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
        options = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE} | options
        process = await asyncio.create_subprocess_exec(*map(str, command), env=environ, **options)
        running.append(process)
        return process

    yield start_one
    for process in running:
        if process.returncode is None:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it ends in this very moment
                kill_with_children(process.pid)
        await process.communicate()


@pytest.fixture
def milepost(start: Start) -> Start:
    """Runs `milepost ARGS...`."""

    async def run(*args: str | Path, **options: Any) -> asyncio.subprocess.Process:
        return await start(sys.executable, "-m", "milepost.cli", *args, **options)

    return run


class Buffer:
    """A real buffer with its embedded Redis, which can be killed and started again on its port."""

    def __init__(self, start: Start, data_dir: Path) -> None:
        self._start, self.data_dir = start, data_dir
        self.address, self._process = f"127.0.0.1:{free_port()}", None

    async def start(self) -> None:
        """Starts it and waits for its readiness line."""
        flags = ["--listen", self.address, "--data_dir", str(self.data_dir)]
        log = (self.data_dir.parent / "buffer.log").open("ab")
        with log:
            process = await self._start(
                sys.executable, "-m", "milepost_buffer", "serve", *flags, stderr=log, start_new_session=True
            )
        line = await asyncio.wait_for(process.stdout.readline(), DEADLINE_S)
        self._process = process
        assert parse_readiness(line.decode())["grpc"] == self.address

    async def kill(self) -> None:
        """Ends it and its Redis at once."""
        children = kill_with_children(self._process.pid)
        await self._process.communicate()
        await until(lambda: not any(alive(c.pid) for c in children), what="Redis ends")

    def client(self) -> BufferClient:
        """A client of it."""
        return BufferClient(self.address)


@pytest.fixture
async def buffer(start: Start, tmp_path: Path) -> Buffer:
    """A running buffer."""
    buffer = Buffer(start, tmp_path / "redis")
    await buffer.start()
    return buffer
