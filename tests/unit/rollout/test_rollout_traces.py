"""Traces of rollouts: the engine hears of each sample's span, samples carry it, streams begin traces."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from opentelemetry import trace

from milepost.types import Outcome, Prompt, RolloutOptions, Trajectories
from milepost_rollout.capacity import SampleSlots
from milepost_rollout.engine_client import EngineClient
from milepost_rollout.rewards.pool import WorkerPool
from milepost_rollout.rewards.scorer import Scorer
from milepost_rollout.roller import GroupRoller
from milepost_rollout.sampler import Sampler, SamplerSettings
from milepost_rollout.status import Counters
from milepost_rollout.stream import RolloutStream
from spans import recording

THEIRS = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
async def roller(engine: Any, tokenizer: Any) -> AsyncIterator[GroupRoller]:
    """Rolls out over the fake engine, which answers two tokens."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.json_response(engine.reply([1, 2]))

    engine.answer = answer
    counters = Counters()
    client = EngineClient(engine.url)
    scorer = Scorer(WorkerPool(size=1, timeout_s=5.0), timeout_s=5.0)
    sampler = Sampler(client, slots=SampleSlots(8), settings=SamplerSettings(), counters=counters)
    yield GroupRoller(sampler=sampler, scorer=scorer, tokenizer=tokenizer, counters=counters)
    await scorer.close()
    await client.close()


async def stream(roller: GroupRoller, prompt: Prompt, *, reward: str = "exact") -> Trajectories:
    """The trajectories of one prompt."""
    options = RolloutOptions(samples_per_prompt=2, reward=reward, run_id="r")

    async def prompts() -> AsyncIterator[Prompt]:
        yield prompt

    made = RolloutStream(roller, options=options, limit=1, name="s")
    (done,) = [t async for t in made.run(prompts())]
    return done


def prompt(traceparent: str = "") -> Prompt:
    return Prompt(prompt_id="p", input_ids=np.array([5, 6], np.int32), traceparent=traceparent)


@pytest.mark.parametrize("traceparent", ["", THEIRS])
async def test_engine_and_samples_are_told_the_span_of_each_sample(
    roller: GroupRoller, engine: Any, traceparent: str
) -> None:
    with recording() as finished:
        done = await stream(roller, prompt(traceparent))
        spans = {s.context.span_id: s for s in finished()}
    (rollout,) = [s for s in spans.values() if s.name == "gateway.rollout"]
    assert (rollout.parent is None) == (not traceparent)
    if traceparent:
        assert trace.format_span_id(rollout.parent.span_id) == THEIRS[36:52]
    names = sorted(s.name for s in spans.values() if s is not rollout)
    assert names == ["gateway.generate", "gateway.generate", "gateway.reward"]
    assert {s.parent.span_id for s in spans.values() if s is not rollout} == {rollout.context.span_id}
    assert sorted(s.traceparent for s in done.samples) == sorted(h["traceparent"] for h in engine.headers)
    for sample in done.samples:
        span = spans[int(sample.traceparent[36:52], 16)]
        assert span.attributes["milepost.sample"] == sample.index
        assert span.attributes["milepost.outcome"] == "completed"
        assert span.attributes["milepost.version"] == 7


async def test_without_tracing_samples_and_requests_carry_none(roller: GroupRoller, engine: Any) -> None:
    done = await stream(roller, prompt())
    assert {s.traceparent for s in done.samples} == {""}
    assert not [h for h in engine.headers if "traceparent" in h]


async def test_a_reward_that_fails_fails_its_span(roller: GroupRoller) -> None:
    with recording() as finished:
        done = await stream(roller, prompt(), reward="grpc://127.0.0.1:1")
        (reward,) = [s for s in finished() if s.name == "gateway.reward"]
    assert {s.outcome for s in done.samples} == {Outcome.REWARD_ERROR}
    assert reward.status.status_code is trace.StatusCode.ERROR
    assert "grpc://127.0.0.1:1" in reward.status.description
    assert reward.attributes["milepost.reward"] == "grpc://127.0.0.1:1"
