"""Slots for samples: never more than the limit, evaluation first, nobody forgotten."""

from __future__ import annotations

import asyncio
import random

import pytest

from milepost_rollout.capacity import Priority, SampleSlots

EVALUATION, TRAINING = Priority.EVALUATION, Priority.TRAINING


class Holder:
    """A task that takes a slot and keeps it until told."""

    def __init__(self, slots: SampleSlots, priority: Priority) -> None:
        self.has_it = asyncio.Event()
        self.let_go = asyncio.Event()
        self.task = asyncio.create_task(self._run(slots, priority))

    async def _run(self, slots: SampleSlots, priority: Priority) -> None:
        async with slots.hold(priority):
            self.has_it.set()
            await self.let_go.wait()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_evaluation_goes_before_training_that_came_earlier():
    slots = SampleSlots(1)
    first, training, evaluation = (Holder(slots, p) for p in (TRAINING, TRAINING, EVALUATION))
    await settle()
    assert [h.has_it.is_set() for h in (first, training, evaluation)] == [True, False, False]
    first.let_go.set()
    await evaluation.has_it.wait()
    assert not training.has_it.is_set()
    evaluation.let_go.set()
    await training.has_it.wait()
    training.let_go.set()
    await asyncio.gather(first.task, training.task, evaluation.task)
    assert slots.held == 0


async def test_evaluation_cannot_take_all_slots():
    slots = SampleSlots(3, evaluation_limit=1)
    holders = [Holder(slots, EVALUATION) for _ in range(3)] + [Holder(slots, TRAINING) for _ in range(2)]
    await settle()
    assert [h.has_it.is_set() for h in holders] == [True, False, False, True, True]
    for h in holders:
        h.let_go.set()
    await asyncio.gather(*(h.task for h in holders))


async def test_a_cancelled_waiter_takes_nothing_with_it():
    slots = SampleSlots(1)
    first, gone, last = (Holder(slots, TRAINING) for _ in range(3))
    await settle()
    gone.task.cancel()
    await settle()
    first.let_go.set()
    await last.has_it.wait()
    last.let_go.set()
    await last.task
    assert slots.held == 0


async def test_cancelled_in_the_instant_its_turn_comes():
    slots = SampleSlots(1)
    first, unlucky, last = (Holder(slots, TRAINING) for _ in range(3))
    await settle()
    first.let_go.set()
    await first.has_it.wait()
    await asyncio.sleep(0)  # the slot is handed to `unlucky` as `first` ends
    unlucky.task.cancel()
    await last.has_it.wait()
    last.let_go.set()
    await last.task
    assert slots.held == 0


@pytest.mark.parametrize("seed", range(20))
async def test_limits_hold_and_everybody_is_served(seed: int):
    rng = random.Random(seed)
    slots = SampleSlots(rng.randint(1, 4), evaluation_limit=rng.randint(1, 4))
    holding = {EVALUATION: 0, TRAINING: 0}
    served = 0

    async def work(priority: Priority) -> None:
        nonlocal served
        for _ in range(rng.randint(0, 3)):
            await asyncio.sleep(0)
        async with slots.hold(priority):
            holding[priority] += 1
            assert sum(holding.values()) <= slots.limit
            assert holding[EVALUATION] <= slots.evaluation_limit
            try:
                for _ in range(rng.randint(0, 3)):
                    await asyncio.sleep(0)
            finally:
                holding[priority] -= 1
        served += 1

    tasks = [asyncio.create_task(work(rng.choice((EVALUATION, TRAINING)))) for _ in range(30)]
    await settle()
    doomed = rng.sample(tasks, 5)
    for task in doomed:
        task.cancel()
    async with asyncio.timeout(30):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results)
    assert served == sum(r is None for r in results)
    assert served >= 25
    assert slots.held == 0
