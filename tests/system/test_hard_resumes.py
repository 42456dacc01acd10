"""Three hard places of a trainer: a Redis that is full, a step that kills it, checkpoints that are lost.

Each is made for real, on a whole stack, and each run goes on to its end with a ledger that closes.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from milepost import types as t
from milepost_buffer.embedded import EmbeddedRedis
from stack import ARITHMETIC, Stack, run, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def prompts(folder: Path, count: int) -> str:
    run(sys.executable, ARITHMETIC / "make_data.py", "--out", folder, "--train", str(count))
    return str(folder / "train.jsonl")


def log_of(stack: Stack, name: str) -> str:
    return (stack.run_dir / "logs" / f"{name}.log").read_text(errors="replace")


async def finished(stack: Stack, *, count: int) -> t.AuditReport:
    """Waits until the run is over; its ledger must close over all prompts."""
    async with stack.buffer() as buffer:

        async def over() -> bool:
            return (await buffer.get_run(stack.run_id)).finished

        await until("the run is finished", over, within_s=150)
        audit = await buffer.audit_ledger(stack.run_id)
    assert (audit.accepted, audit.in_flight, audit.problems) == (count, 0, ())
    return audit


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    async with EmbeddedRedis(tmp_path / "redis") as server:
        yield server


async def test_a_full_redis_is_waited_for(start_stack, tmp_path: Path, redis: EmbeddedRedis) -> None:
    count = 120
    stack = start_stack("--feed", prompts(tmp_path, count), "--stay", buffer={"redis_url": redis.url})
    async with Redis.from_url(redis.url) as admin:
        async with stack.buffer() as buffer:

            async def committed() -> bool:
                return (await stack.stats(buffer)).committed_step >= 5

            await until("step 5 is committed", committed, within_s=90)
        before = {name: stack.service(name)["starts"] for name in ("trainer", "rollout", "buffer")}
        await admin.config_set("maxmemory", "1mb")

        async def told() -> bool:
            return "the ledger has no room, asking again: redis" in log_of(stack, "trainer")

        await until("the trainer is told that Redis is full", told, within_s=60)
        await admin.config_set("maxmemory", "0")
    audit = await finished(stack, count=count)
    assert audit.trained == count
    assert {name: stack.service(name)["starts"] for name in before} == before
    stack.stop()  # before its Redis


async def test_checkpoints_are_lost_and_every_engine_is_new(start_stack, tmp_path: Path, model: Path) -> None:
    """No engine serves what was published, and the steps after the checkpoint must be rolled out again."""
    count = 80
    feed = prompts(tmp_path, count)
    stack = start_stack("--feed", feed, "--stay")
    async with stack.buffer() as buffer:

        async def trimmed() -> bool:
            stats = await stack.stats(buffer)
            return stats.trimmed_step >= 8 and stats.committed_step >= 13

        await until("payloads up to step 8 are gone", trimmed, within_s=90)
    stack.stop()
    kept = sorted((stack.run_dir / "checkpoints").glob("step_*"))
    for folder in kept:
        shutil.rmtree(folder)  # all of them: what is left are the initial weights
    config = stack.run_dir / "milepost.toml"
    text = config.read_text()
    config.write_text(text.replace("[trainer]\n", '[trainer]\non_gap = "regenerate"\n'))
    again = stack.again("--feed", feed, "--stay")
    try:
        audit = await finished(again, count=count)
    finally:
        again.stop()
    assert audit.trained == count
    assert "from checkpoint 0; committed" in log_of(again, "trainer")
    rows = [json.loads(line) for line in (again.run_dir / "steps.jsonl").read_text().splitlines()]
    newest = {row["step"]: row["prompt_ids"] for row in rows}
    assert sorted(newest) == list(range(1, count // 4 + 1))
    trained = [prompt_id for ids in newest.values() for prompt_id in ids]
    assert sorted(trained) == sorted({prompt_id for row in rows for prompt_id in row["prompt_ids"]})
