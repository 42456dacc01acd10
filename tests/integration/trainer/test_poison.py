"""A step that killed the trainer again and again: named, and left out where the settings say so."""

from __future__ import annotations

from typing import Any

import pytest

from milepost import BufferClient
from milepost import types as t


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_poisonous_step_is_named_and_tried_again(stack: Any, rolling: Any, wait_until: Any) -> None:
    await stack.start()
    async with BufferClient(stack.buffer) as buffer:
        poison = await step_that_kills(stack, buffer, rolling, wait_until)
        second = stack.start_trainer("--publish.transport", "shm", "--num_steps", "1")
        assert await second.exit_code() == 0, second.tail()
        assert await stack.committed(buffer) == 1
    assert "step 1 was resumed three times without a commit: p/" in second.tail()
    assert all(f"{name} (" in second.tail() for name in poison)
    assert 'set [trainer] on_poison = "drop"' in second.tail()


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_poisonous_step_is_left_out(stack: Any, rolling: Any, wait_until: Any) -> None:
    await stack.start()
    async with BufferClient(stack.buffer) as buffer:
        poison = await step_that_kills(stack, buffer, rolling, wait_until)
        second = stack.start_trainer("--publish.transport", "shm", "--on_poison", "drop")
        await stack.feed(buffer, first=4, count=8, close=True)
        assert await second.exit_code() == 0, second.tail()
        rows = {row.prompt_id: row async for row in buffer.get_ledger(stack.run_id)}
        audit = await buffer.audit_ledger(stack.run_id, witnesses=[witness(stack)])
    assert "step 1 was resumed three times without a commit: p/" in second.tail()
    assert "its prompts are dropped with reason poison" in second.tail()
    assert "8 of 12 prompts trained, 4 dropped (poison 4)" in second.tail()
    dropped = {name for name, row in rows.items() if row.drop_reason is t.DropReason.POISON}
    assert dropped == set(poison)
    assert {(rows[name].step, rows[name].state) for name in poison} == {(1, t.PromptState.DROPPED)}
    assert (audit.trained, audit.dropped, audit.problems) == (8, {"poison": 4}, ())
    assert [row["step"] for row in stack.rows("metrics.jsonl")] == [2, 3]


async def step_that_kills(stack: Any, buffer: BufferClient, rolling: Any, wait_until: Any) -> list[str]:
    """A run whose step 1 has killed its trainers; answers the step's prompts."""
    stack.start_engine("engine")
    first = stack.start_trainer("--publish.transport", "shm")
    await first.ready()

    async def published() -> bool:
        return (await buffer.get_run(stack.run_id)).weight_version > 0

    await wait_until("the first weights are published", published, hint=first.tail)
    first.process.kill()
    await first.exit_code()
    rolling(buffer, stack.run_id)
    await stack.feed(buffer, first=0, count=4)
    return await leased_by_one_that_dies(buffer, stack.run_id, times=3)


async def leased_by_one_that_dies(buffer: BufferClient, run_id: str, *, times: int) -> list[str]:
    """Step 1 is leased, and its trainer dies before the commit, this often; answers the step's prompts."""
    names: list[str] = []
    for _ in range(times + 1):
        term = (await buffer.resume_consumer(run_id)).term
        await buffer.resume_consumer(run_id, term=term, checkpoint_step=0)
        while not names:
            lease = await buffer.lease_step(run_id, term=term, step=1, max_wait_s=5.0)
            names = [group.prompt_id for group in lease.groups]
    return names


def witness(stack: Any) -> t.Witness:
    rows = stack.rows("steps.jsonl")
    steps = [
        t.StepManifest(
            step=row["step"],
            prompt_ids=tuple(row["prompt_ids"]),
            dropped=tuple(
                t.DroppedGroup(prompt_id=p, reason=t.DropReason[why.upper()])
                for p, why in row.get("dropped", {}).items()
            ),
        )
        for row in rows
    ]
    return t.Witness(name="steps.jsonl", steps=tuple(steps))
