"""The check of engines' log-probs after each publication: real ranks, engine, router and buffer."""

from __future__ import annotations

from typing import Any

import pytest

from milepost import BufferClient

NAME = "train/engine_logprob_abs_diff"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "ranks, wire, least, most",
    [("2", "float32", 0.0, 1e-4), ("1", "bfloat16", 1e-4, 1.0)],
    ids=["the same weights", "other weights"],
)
async def test_each_publication_is_checked_against_the_trainers_own_forward_pass(
    stack: Any, rolling: Any, ranks: str, wire: str, least: float, most: float
) -> None:
    """An engine that holds rounded weights is told from one that holds the trainer's."""
    await stack.start()
    stack.start_engine("engine")
    flags = ("--nproc", ranks, "--publish.transport", "shm", "--publish.wire_dtype", wire)
    trainer = stack.start_trainer(*flags, "--debug.check_logprobs", "--debug.logprob_tolerance", "1e-4")
    await trainer.ready()
    async with BufferClient(stack.buffer) as buffer:
        rolling(buffer, stack.run_id)
        await stack.feed(buffer, first=0, count=12, close=True)
        assert await trainer.exit_code() == 0, trainer.tail()
    found = [row.get(NAME) for row in stack.rows("metrics.jsonl")]
    assert len(found) == 3
    assert all(each is not None and least <= each <= most for each in found), found
    warned = "more than debug.logprob_tolerance = 0.0001" in trainer.log.read_text()
    assert warned is (wire == "bfloat16")
