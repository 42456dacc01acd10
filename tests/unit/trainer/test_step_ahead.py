"""The next step is fetched, decoded and packed while this one trains."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from milepost.convert import make_group
from milepost.types import Outcome, Prompt, Sample
from milepost_trainer.backends.fsdp import FsdpBackend
from milepost_trainer.crew import Rank, StepOrder, StepStart
from milepost_trainer.learner import Learner
from milepost_trainer.objectives.grpo import Grpo
from milepost_trainer.plan import GroupInfo, plan_step
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.world import World

DEADLINE_S = 60
SIZE = 5


def payload(prompt_id: str) -> bytes:
    rng = np.random.default_rng(len(prompt_id))
    mask = np.array([0, 0, 1, 1, 1], np.uint8)
    samples = [
        Sample(
            index=index,
            tokens=rng.integers(0, 16, SIZE).astype(np.int32),
            loss_mask=mask,
            logprobs=(np.full(SIZE, -2.7) * mask).astype(np.float32),
            prompt_length=2,
            reward=float(index),
            outcome=Outcome.COMPLETED,
        )
        for index in range(2)
    ]
    return make_group(Prompt(prompt_id=prompt_id, text="x"), attempt=1, samples=samples).payload


class Packing(Learner):
    """A learner that says when it has prepared a step, and on which thread."""

    prepared: threading.Event
    thread: str

    def prepare(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        made = super().prepare(*args, **kwargs)
        self.thread = threading.current_thread().name
        self.prepared.set()
        return made


@pytest.fixture
async def rank(model_dir: Path) -> AsyncIterator[Rank]:
    settings = TrainerSettings.model_validate({"model_dir": str(model_dir), "initial_weights": "random"})
    learner = Packing(FsdpBackend(settings, World()), Grpo())
    learner.prepared = threading.Event()

    async def fetch(prompt_ids: Sequence[str]) -> dict[str, bytes]:
        return {
            prompt_id: payload(prompt_id) if prompt_id != "bad" else b"\xff\xff" for prompt_id in prompt_ids
        }

    made = Rank(World(), learner, fetch=fetch)
    yield made
    await made.close()


def order(*names: str) -> StepOrder:
    infos = [GroupInfo(name, (SIZE, SIZE)) for name in names]
    return StepOrder(plan_step(7, infos, num_ranks=1, updates=1, max_tokens=100))


async def test_a_step_is_packed_while_the_torch_thread_is_busy(rank: Rank) -> None:
    busy = threading.Event()
    training = asyncio.create_task(rank.on_thread(lambda: busy.wait(DEADLINE_S)))
    try:
        await rank.perform("fetch", (order("a", "bad"),))
        assert isinstance(rank.learner, Packing)
        assert await asyncio.to_thread(rank.learner.prepared.wait, DEADLINE_S)
        assert not training.done()
        assert not rank.learner.thread.startswith("torch")
    finally:
        busy.set()
    assert await training
    started = await rank.perform("start_step", (7,))
    assert isinstance(started, StepStart)
    assert dict(started.refused) == {"bad": "its payload cannot be read"}
    assert started.fetch_s >= 0 < started.pack_s
    assert await rank.perform("start_update", (0,)) == 1
    assert await rank.perform("train_micro_batch", (0,)) is None
    report = await rank.perform("finish_update", ())
    assert report.num_tokens == 6


async def test_a_step_that_is_ordered_anew_replaces_what_was_fetched(rank: Rank) -> None:
    await rank.perform("fetch", (order("a", "bad"),))
    await rank.perform("fetch", (order("a", "b"),))
    started = await rank.perform("start_step", (7,))
    assert not started.refused
