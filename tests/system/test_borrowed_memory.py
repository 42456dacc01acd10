"""Engines lend memory while steps train, processes die in the middle of it, and the run ends as ever."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from milepost import RouterClient
from stack import ARITHMETIC, MILEPOST, Stack, run, until

STEPS = 20
PROMPTS = 4 * STEPS


async def kill_while_lent(stack: Stack, name: str) -> None:
    """kill -9 in a moment in which an engine's memory is released."""
    service = await stack.ready(name)
    async with RouterClient(stack.address("router")) as router, asyncio.timeout(60):
        async for fleet in router.watch_fleet(stack.run_id):
            if any(e.detail == "its memory is released" for e in fleet.engines):
                break
    os.kill(service["pid"], signal.SIGKILL)
    if name in ("trainer", "router"):  # the run needs it; the other engine goes on meanwhile
        await stack.ready(name, starts=service["starts"] + 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
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
    stack = start_stack(
        "--feed", str(tmp_path / "train.jsonl"), "--stay", name="lent", trainer__publish=lending
    )
    async with stack.buffer() as buffer:

        async def committed(step: int) -> bool:
            return (await stack.stats(buffer)).committed_step >= step

        async def finished() -> bool:
            return (await buffer.get_run(stack.run_id)).finished

        for step, name in ((2, "trainer"), (6, "router"), (10, "engine-0")):
            await until(f"step {step} committed", lambda step=step: committed(step), within_s=60)
            await kill_while_lent(stack, name)
        await until("the run is finished", finished, within_s=120)
        audit = await buffer.audit_ledger(stack.run_id)
        report = run(
            MILEPOST, "ledger", "--run", stack.run_id, "--buffer", buffer.address, "--audit",
            "--witness", stack.run_dir / "acknowledged.jsonl", "--witness", stack.run_dir / "steps.jsonl",
        )  # fmt: skip
    assert audit.problems == ()
    assert (audit.accepted, audit.trained, audit.in_flight, audit.lost, audit.twice) == (
        PROMPTS, PROMPTS, 0, 0, 0,
    )  # fmt: skip
    assert "the audit closes" in report
    assert stack.stop() == 130
