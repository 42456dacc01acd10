"""Health is answered while a step computes: a long step is not silence."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from milepost.cli.health import check
from milepost_common.server import GrpcServer
from milepost_trainer.backends.fsdp import FsdpBackend
from milepost_trainer.batch import TrainSequence
from milepost_trainer.crew import Rank
from milepost_trainer.learner import Learner, TrainGroup
from milepost_trainer.objectives.grpo import Grpo
from milepost_trainer.plan import GroupInfo, plan_step
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.world import World

NUM_GROUPS, SAMPLES, LENGTH = 48, 4, 120


def group(seed: int) -> TrainGroup:
    rng = np.random.default_rng(seed)
    mask = np.array([0] + [1] * (LENGTH - 1), np.uint8)
    sequences = tuple(
        TrainSequence(
            tokens=rng.integers(0, 16, LENGTH).astype(np.int32),
            loss_mask=mask,
            logprobs=(np.full(LENGTH, -2.7) * mask).astype(np.float32),
        )
        for _ in range(SAMPLES)
    )
    return TrainGroup(rewards=rng.normal(size=SAMPLES), sequences=sequences)


async def no_payloads(prompt_ids: Sequence[str]) -> dict[str, bytes]:
    raise AssertionError(prompt_ids)


async def test_health_is_answered_while_a_micro_batch_computes(model_dir: Path) -> None:
    settings = TrainerSettings.model_validate({"model_dir": str(model_dir), "initial_weights": "random"})
    backend = FsdpBackend(settings, World())
    learner = Learner(backend, Grpo(), vocab_size=backend.vocab_size)
    rank = Rank(World(), learner, fetch=no_payloads)
    groups = {str(i): group(i) for i in range(NUM_GROUPS)}
    whole = SAMPLES * LENGTH * NUM_GROUPS
    plan = plan_step(
        1,
        [GroupInfo(name, (LENGTH,) * SAMPLES) for name in groups],
        num_ranks=1,
        updates=1,
        max_tokens=2 * whole,  # one micro-batch: the longest that this step can be silent
    )

    async def answered_while_it_trains(address: str) -> int:
        await rank.on_thread(lambda: learner.start_step(plan, groups))
        assert await rank.on_thread(lambda: learner.start_update(0)) == 1
        training = asyncio.create_task(rank.on_thread(lambda: learner.train_micro_batch(0)))
        answered = 0
        while not training.done():
            await check(address, timeout_s=20.0)
            answered += not training.done()
        await training
        return answered

    async with GrpcServer(listen="127.0.0.1:0") as server:
        await server.start()
        most = 0
        for _ in range(4):  # again, where the machine stood still and let the step alone go on
            most = max(most, await answered_while_it_trains(server.address))
            if most >= 10:  # each on a new connection
                break
    await rank.close()
    assert most >= 10
