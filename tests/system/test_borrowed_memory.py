"""Engines lend memory while steps train, processes die in the middle of it, and the run ends as ever."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from milepost import RouterClient
from stack import ARITHMETIC, MILEPOST, READY_S, Stack, run

PROMPTS = 20_000  # more than the run will train


async def kill_while_lent(stack: Stack, name: str) -> None:
    """kill -9 in a moment in which an engine's memory is released."""
    service = await stack.ready(name)
    async with RouterClient(stack.address("router")) as router, asyncio.timeout(READY_S):
        async for fleet in router.watch_fleet(stack.run_id):
            if any(e.detail == "its memory is released" for e in fleet.engines):
                break
    os.kill(service["pid"], signal.SIGKILL)
    if name in ("trainer", "router"):  # the run needs it; the other engine goes on meanwhile
        await stack.ready(name, starts=service["starts"] + 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_whoever_dies_while_memory_is_lent_the_run_ends_and_the_audit_closes(
    start_stack, tmp_path: Path
) -> None:
    run(sys.executable, ARITHMETIC / "make_data.py", "--out", tmp_path, "--train", str(PROMPTS))
    lending = {
        "transport": "shm",
        "release_memory": ["kv_cache", "weights"],
        "memory_lease_s": 5.0,
        "memory_drain_s": 0.2,
    }
    stack = start_stack("--stay", name="lent", trainer__publish=lending)
    feeder = await stack.feed(tmp_path / "train.jsonl")
    async with stack.buffer() as buffer:
        await stack.goes_on(buffer, after=0, steps=2)
        for name in ("trainer", "router", "engine-0"):
            await kill_while_lent(stack, name)
            await stack.goes_on(buffer, steps=4)
        await stack.finish(buffer, feeder)
        audit = await buffer.audit_ledger(stack.run_id)
        report = run(
            MILEPOST, "ledger", "--run", stack.run_id, "--buffer", buffer.address, "--audit",
            "--witness", stack.run_dir / "acknowledged.jsonl", "--witness", stack.run_dir / "steps.jsonl",
        )  # fmt: skip
    assert audit.problems == ()
    assert (audit.trained, audit.in_flight, audit.lost, audit.twice) == (audit.accepted, 0, 0, 0)
    assert "the audit closes" in report
    assert stack.stop() == 130
