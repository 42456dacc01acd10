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

from milepost import BufferClient
from milepost_buffer.embedded import EmbeddedRedis
from stack import ARITHMETIC, READY_S, Feeder, Stack, run, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PROMPTS = 20_000  # more than the runs will train


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    run(sys.executable, ARITHMETIC / "make_data.py", "--out", tmp_path, "--train", str(PROMPTS))
    return tmp_path / "train.jsonl"


def log_of(stack: Stack, name: str) -> str:
    return (stack.run_dir / "logs" / f"{name}.log").read_text(errors="replace")


async def ends_well(stack: Stack, buffer: BufferClient, feeder: Feeder) -> None:
    """The run goes on, and ends once nothing is fed; its ledger must close over all that was taken."""
    await stack.goes_on(buffer, steps=4)
    await stack.finish(buffer, feeder)
    audit = await buffer.audit_ledger(stack.run_id)
    assert (audit.trained, audit.in_flight, audit.problems) == (audit.accepted, 0, ())


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    async with EmbeddedRedis(tmp_path / "redis") as server:
        yield server


async def test_a_full_redis_is_waited_for(start_stack, prompts: Path, redis: EmbeddedRedis) -> None:
    stack = start_stack("--stay", buffer={"redis_url": redis.url})
    feeder = await stack.feed(prompts)
    async with stack.buffer() as buffer, Redis.from_url(redis.url) as admin:
        await stack.goes_on(buffer, after=0, steps=5)
        before = {name: stack.service(name)["starts"] for name in ("trainer", "rollout", "buffer")}
        await admin.config_set("maxmemory", "1mb")

        async def told() -> bool:
            return "the ledger has no room, asking again: redis" in log_of(stack, "trainer")

        await until("the trainer is told that Redis is full", told, within_s=READY_S)
        await admin.config_set("maxmemory", "0")
        await ends_well(stack, buffer, feeder)
    assert {name: stack.service(name)["starts"] for name in before} == before
    stack.stop()  # before its Redis


async def test_checkpoints_are_lost_and_every_engine_is_new(start_stack, prompts: Path) -> None:
    """No engine serves what was published, and the steps after the checkpoint must be rolled out again."""
    stack = start_stack("--stay")
    feeder = await stack.feed(prompts)
    async with stack.buffer() as buffer:

        async def trimmed() -> bool:
            stats = await stack.stats(buffer)
            return stats.trimmed_step >= 8 and stats.committed_step >= 13

        await until("payloads up to step 8 are gone", trimmed, within_s=READY_S)
    await feeder.stop()
    stack.stop()
    kept = sorted((stack.run_dir / "checkpoints").glob("step_*"))
    for folder in kept:
        shutil.rmtree(folder)  # all of them: what is left are the initial weights
    config = stack.run_dir / "milepost.toml"
    text = config.read_text()
    config.write_text(text.replace("[trainer]\n", '[trainer]\non_gap = "regenerate"\n'))
    again = stack.again("--stay")
    try:
        feeder = await again.feed(prompts)
        async with again.buffer() as buffer:
            await ends_well(again, buffer, feeder)
    finally:
        again.stop()
    assert "from checkpoint 0; committed" in log_of(again, "trainer")
    rows = [json.loads(line) for line in (again.run_dir / "steps.jsonl").read_text().splitlines()]
    newest = {row["step"]: row["prompt_ids"] for row in rows}
    assert sorted(newest) == list(range(1, max(newest) + 1))
    trained = [prompt_id for ids in newest.values() for prompt_id in ids]
    assert sorted(trained) == sorted({prompt_id for row in rows for prompt_id in row["prompt_ids"]})
