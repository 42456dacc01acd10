"""How a run ends: what engines were given on the way, what the last line says, and with which status."""

from __future__ import annotations

from typing import Any

import pytest

from milepost import BufferClient, WeightClient
from milepost.errors import NotFound


async def labels_of(stack: Any) -> list[int]:
    """Label of every version that was published, by number."""
    labels: list[int] = []
    async with WeightClient(stack.buffer) as weights:
        while True:
            try:
                labels.append((await weights.get_version(stack.run_id, version=len(labels) + 1)).label)
            except NotFound:
                return labels


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_every_second_step_is_published_and_the_last_line_accounts_for_all(
    stack: Any, rolling: Any
) -> None:
    await stack.start()
    stack.start_engine("engine")
    trainer = stack.start_trainer("--run.publish_every", "2", "--publish.transport", "shm")
    await trainer.ready()
    async with BufferClient(stack.buffer) as buffer:
        await stack.feed(buffer, first=0, count=2)
        result = await buffer.cancel_prompts(stack.run_id, prompt_ids=["p/0", "p/1"])
        assert len(result.cancelled) == 2
        rolling(buffer, stack.run_id)
        await stack.feed(buffer, first=2, count=12, close=True)
        assert await trainer.exit_code() == 0, trainer.tail()
    assert await labels_of(stack) == [0, 2, 3], "the last step is published, whatever its number"
    assert [row["milepost/step_updates"] for row in stack.rows("metrics.jsonl")] == [2, 2, 2]
    assert "12 of 14 prompts trained, 2 dropped (cancelled 2)" in trainer.tail()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_run_whose_prompts_were_all_dropped_fails(stack: Any) -> None:
    await stack.start()
    trainer = stack.start_trainer()
    await trainer.ready()
    async with BufferClient(stack.buffer) as buffer:
        await stack.feed(buffer, first=0, count=3)
        await buffer.cancel_prompts(stack.run_id, prompt_ids=["p/0", "p/1", "p/2"])
        await buffer.close_source(stack.run_id, source_id="test")
        assert await trainer.exit_code() == 4, trainer.tail()
    assert "0 of 3 prompts trained, 3 dropped (cancelled 3)" in trainer.tail()
    assert "nothing was trained" in trainer.tail()
