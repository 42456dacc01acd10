"""The gateway's metrics, from the objects that count."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from milepost.errors import InvalidArgument
from milepost.types import Evaluation, Outcome, Prompt, Sample
from milepost_rollout.capacity import Priority, SampleSlots
from milepost_rollout.metrics import SPECS
from milepost_rollout.rewards.pool import WorkerPool
from milepost_rollout.rewards.scorer import Scorer
from milepost_rollout.status import Counters


def numbers(instruments: Any) -> dict[tuple[str, ...], Any]:
    """(name, label values ...) -> number."""
    return {(i.spec.name, *labels): value for i in instruments for labels, value in i.read()}


def sample(index: int, outcome: Outcome = Outcome.COMPLETED, *, text: str = "4") -> Sample:
    """Three tokens, two of them the model's."""
    return Sample(
        index=index,
        tokens=np.array([1, 2, 3], np.int32),
        prompt_length=1,
        loss_mask=np.array([0, 1, 1], np.uint8),
        logprobs=np.zeros(3, np.float32),
        outcome=outcome,
        text=text,
    )


def test_samples_and_groups_are_told_by_what_became_of_them() -> None:
    counters = Counters()
    before = numbers(counters.instruments)
    assert before["milepost_samples", "completed"] == 0
    assert ("rollout/truncated",) not in before, "there is no share of nothing"
    assert ("milepost_evaluation_reward",) not in before
    for outcome in (Outcome.COMPLETED, Outcome.TRUNCATED, Outcome.COMPLETED, Outcome.ENGINE_ERROR):
        counters.sampled(sample(0, outcome))
    counters.settled["sealed"] += 2
    counters.last_evaluation = Evaluation(reward_mean=0.75, weight_label=8)
    got = numbers(counters.instruments)
    assert [got["milepost_samples", o] for o in ("completed", "truncated", "engine_error")] == [2, 1, 1]
    assert got["rollout/truncated",] == 0.25
    assert got["milepost_tokens_generated",] == 8
    assert got["milepost_groups_settled", "sealed"] == 2
    assert (got["milepost_evaluation_reward",], got["milepost_evaluation_label",]) == (0.75, 8)


def test_the_truncated_share_is_of_the_last_samples() -> None:
    counters = Counters()
    for _ in range(300):
        counters.sampled(sample(0, Outcome.TRUNCATED))
    for _ in range(256):
        counters.sampled(sample(0))
    assert numbers(counters.instruments)["rollout/truncated",] == 0


def test_time_goes_to_what_holds_the_gateway_up_most() -> None:
    counters = Counters()

    def waits_for() -> set[str]:
        return {
            key[1] for key, v in numbers(counters.instruments).items() if key[0] == "milepost_gateway_seconds"
        }

    assert waits_for() == {"nothing"}
    counters.leasing = "prompts: staleness bound"
    counters.engines = "engines: 503"
    counters.ledger = "ledger: away"
    assert waits_for() == {"nothing", "prompts", "engines"}, "engines go before the ledger"
    counters.engines = ""
    assert waits_for() == {"nothing", "prompts", "engines", "ledger"}
    counters.ledger = counters.leasing = ""
    assert counters.waiting_for == ""
    counters.leasing = "resume: the gateway is paused"
    assert "resume" in waits_for()


async def test_slots_show_who_holds_and_who_waits() -> None:
    slots = SampleSlots(1)

    async def take() -> None:
        async with slots.hold(Priority.TRAINING):
            pass

    async with slots.hold(Priority.TRAINING):
        waiting = asyncio.create_task(take())
        await asyncio.sleep(0)  # it queues up
        got = numbers(slots.instruments)
        assert [got["milepost_sample_slots", s] for s in ("held", "waited_for", "limit")] == [1, 1, 1]
    await waiting
    assert numbers(slots.instruments)["milepost_sample_slots", "held"] == 0


class Remote:
    """A remote reward that answers as told."""

    def __init__(self, address: str) -> None:
        self.address = address

    async def score(self, prompt: Prompt, *, samples: Sequence[Sample], timeout_s: float | None) -> Any:
        raise InvalidArgument("I do not know this prompt")

    async def close(self) -> None:
        pass


async def test_rewards_are_timed_and_their_errors_counted_by_where() -> None:
    scorer = Scorer(WorkerPool(size=1, timeout_s=20.0), timeout_s=5.0, connect=Remote)
    try:
        prompt = Prompt(prompt_id="p", text="2+2=", label="4")
        samples = [sample(0), sample(1, text="5")]
        for name in ("exact", "", "grpc://h:1"):
            await scorer.score(name, prompt, prompt_text=lambda: "2+2=", samples=samples)
        with pytest.raises(InvalidArgument):
            await scorer.score("nobody", prompt, prompt_text=lambda: "", samples=samples)
    finally:
        await scorer.close()
    got = numbers((scorer.seconds, scorer.errors))
    assert {key[1]: sum(v.counts) for key, v in got.items() if key[0] == "milepost_reward_seconds"} == {
        "inline": 1,
        "remote": 1,
    }
    assert (got["milepost_reward_errors", "inline"], got["milepost_reward_errors", "remote"]) == (0, 2)


def test_specs_are_distinct() -> None:
    assert len({s.name for s in SPECS}) == len(SPECS)
