"""Waiting with a deadline, and processes that never outlive their test."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

DEADLINE_S = 30.0
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
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in children:
                if child.is_running():
                    child.kill()
        await process.communicate()


@pytest.fixture
def milepost(start: Start) -> Start:
    """Runs `milepost ARGS...`."""

    async def run(*args: str | Path, **options: Any) -> asyncio.subprocess.Process:
        return await start(sys.executable, "-m", "milepost.cli", *args, **options)

    return run
