"""One sample's life, against engines that answer as told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loop_clock import skip
from milepost.errors import InvalidArgument
from milepost.types import Outcome, SamplingParams, VersionSpan
from milepost_rollout.backoff import BackoffPolicy
from milepost_rollout.capacity import SampleSlots
from milepost_rollout.draft import Draft
from milepost_rollout.engine_client import EngineAway, EngineFailed, EngineRefused, GenerateRequest
from milepost_rollout.replies import Generation
from milepost_rollout.sampler import EnginesUnavailable, SampleJob, Sampler, SamplerSettings
from milepost_rollout.sampling import resolve
from milepost_rollout.status import Counters


def wrote(ids: list[int], finish: str = "stop", version: int = 7, **more: Any) -> Generation:
    spans = (VersionSpan(start=0, end=len(ids), weight_version=version),) if ids else ()
    array = np.array(ids, np.int32)
    return Generation(
        output_ids=array, logprobs=-array.astype(np.float32), spans=spans, exact=True, finish=finish, **more
    )


class Script:
    """An engine client that plays a list of answers and keeps what it was asked."""

    def __init__(self, *answers: Generation | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[GenerateRequest] = []

    async def generate(self, request: GenerateRequest, *, timeout_s: float) -> Generation:
        assert timeout_s > 0
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


QUICK = BackoffPolicy(first_s=0.001, most_s=0.004)
AWAY = EngineAway("nobody there", answered=False)
NO_FIT = EngineAway("503: no engine serves version 7", answered=True)


def make(script: Script, *, context: Callable[[], int] = lambda: 0, **settings: Any) -> Sampler:
    options = SamplerSettings(**{"backoff": QUICK, "pinned_wait_s": 0.01, **settings})
    return Sampler(
        script,  # type: ignore[arg-type]
        slots=SampleSlots(4),
        settings=options,
        counters=Counters(),
        context_length=context,
    )


def job(**changes: Any) -> SampleJob:
    sampling = resolve(
        SamplingParams(max_new_tokens=changes.pop("max_new_tokens", 8), seed=changes.pop("seed", None))
    )
    return SampleJob(
        **{"prompt_id": "p", "index": 2, "sampling": sampling, "run_id": "r", "min_version": 5, **changes}
    )


def draft() -> Draft:
    return Draft(np.array([9, 9], np.int32))


async def test_one_request_is_enough():
    script, d = Script(wrote([1, 2], matched=2)), draft()
    ending = await make(script).turn(job(seed=40), d)
    assert (ending.outcome, ending.matched) == (Outcome.COMPLETED, 2)
    assert d.tokens.tolist() == [9, 9, 1, 2]
    (asked,) = script.asked
    assert (asked.run_id, asked.min_version, asked.version) == ("r", 5, 0)
    assert asked.sampling["max_new_tokens"] == 8
    assert asked.sampling["sampling_seed"] == 42


async def test_a_length_limit_truncates():
    ending = await make(Script(wrote([1], finish="length"))).turn(job(), draft())
    assert ending.outcome is Outcome.TRUNCATED


async def test_a_reply_cut_short_is_continued_from_its_tokens():
    script, d = Script(wrote([1, 2, 3], finish="abort", version=7), wrote([4], version=8)), draft()
    ending = await make(script).turn(job(), d)
    assert ending.outcome is Outcome.COMPLETED
    assert script.asked[1].input_ids.tolist() == [9, 9, 1, 2, 3]
    assert [a.sampling["max_new_tokens"] for a in script.asked] == [8, 5]
    assert script.asked[0].rid != script.asked[1].rid
    sample = d.finish(index=0, outcome=ending.outcome)
    assert sample.loss_mask.tolist() == [0, 0, 1, 1, 1, 1]
    assert [(s.start, s.end, s.weight_version) for s in sample.version_spans] == [(2, 5, 7), (5, 6, 8)]


async def test_partial_tokens_that_use_up_the_limit_end_the_sample():
    script, d = Script(wrote([1, 2], finish="abort"), EngineFailed("must not be asked")), draft()
    ending = await make(script).turn(job(max_new_tokens=2), d)
    assert ending.outcome is Outcome.TRUNCATED
    assert len(script.asked) == 1


async def test_it_starts_over_where_partial_tokens_may_not_be_kept():
    script, d = Script(wrote([1, 2], finish="abort"), wrote([3])), draft()
    await make(script, keep_partial=False).turn(job(), d)
    assert script.asked[1].input_ids.tolist() == [9, 9]
    assert d.tokens.tolist() == [9, 9, 3]


async def test_aborts_without_progress_are_repeated_until_the_time_is_over():
    class UntilLate(Script):
        async def generate(self, request: GenerateRequest, *, timeout_s: float) -> Generation:
            if len(self.asked) == 4:
                skip(60.0)
            return await super().generate(request, timeout_s=timeout_s)

    skip(0)
    script = UntilLate(wrote([], finish="abort", message="updating"))
    ending = await make(script, timeout_s=60.0).turn(job(), draft())
    assert ending.outcome is Outcome.ENGINE_ERROR
    assert "rollout.sample_timeout_s" in ending.error
    assert "updating" in ending.error
    assert len(script.asked) == 5


async def test_failures_are_bounded_and_named():
    script = Script(EngineFailed("engine e0: meta_info is missing"))
    ending = await make(script, attempts=3).turn(job(), draft())
    assert ending.outcome is Outcome.ENGINE_ERROR
    assert len(script.asked) == 3
    assert "prompt 'p', sample 2: engine e0: meta_info is missing" in ending.error


async def test_a_failure_and_then_an_answer():
    ending = await make(Script(EngineFailed("500"), wrote([1])), attempts=2).turn(job(), draft())
    assert ending.outcome is Outcome.COMPLETED


async def test_nobody_there_is_waited_for_and_not_counted():
    script = Script(*[AWAY] * 20, wrote([1]))
    sampler = make(script, attempts=1)
    ending = await sampler.turn(job(), draft())
    assert ending.outcome is Outcome.COMPLETED
    assert sampler.counters.engines == ""


async def test_nobody_there_until_the_time_is_over_is_no_failure_of_the_sample():
    sampler = make(Script(AWAY), timeout_s=0.05)
    with pytest.raises(EnginesUnavailable, match="nobody there"):
        await sampler.turn(job(), draft())
    assert "nobody there" in sampler.counters.waiting_for


async def test_slots_are_free_while_nobody_is_there():
    script = Script(AWAY)
    sampler = make(script)
    task = asyncio.create_task(sampler.turn(job(), draft()))
    while len(script.asked) < 5:
        assert sampler.slots.held <= 1
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert sampler.slots.held == 0


async def test_a_pinned_sample_is_ended_by_an_abort():
    d = draft()
    ending = await make(Script(wrote([1], finish="abort", message="weights"))).turn(job(version=7), d)
    assert ending.outcome is Outcome.ABORTED
    assert "version 7" in ending.error


async def test_a_pinned_sample_is_ended_when_other_weights_went_on():
    ending = await make(Script(wrote([1], version=8))).turn(job(version=7), draft())
    assert ending.outcome is Outcome.ABORTED


async def test_a_pinned_sample_is_ended_when_no_engine_serves_its_version():
    script = Script(NO_FIT)
    ending = await make(script).turn(job(version=7), draft())
    assert ending.outcome is Outcome.ABORTED
    assert script.asked[0].version == 7


async def test_a_pinned_sample_waits_for_a_router_that_is_away():
    ending = await make(Script(*[AWAY] * 10, wrote([1]))).turn(job(version=7), draft())
    assert ending.outcome is Outcome.COMPLETED


async def test_a_refusal_for_length_makes_the_prompt_invalid():
    said = EngineRefused("400: The input (2 tokens) is longer than the model's context length (2 tokens)")
    with pytest.raises(InvalidArgument, match=r"2 tokens leave no room.*shorten it") as caught:
        await make(Script(said)).turn(job(), draft())
    assert caught.value.reason == "PROMPT_TOO_LONG"


async def test_another_refusal_is_an_error_at_once():
    script = Script(EngineRefused("400: unknown sampling parameter foo"))
    ending = await make(script).turn(job(), draft())
    assert ending.outcome is Outcome.ENGINE_ERROR
    assert "foo" in ending.error
    assert len(script.asked) == 1


async def test_output_is_clipped_to_the_context():
    script = Script(wrote([1, 2, 3], finish="length"))
    ending = await make(script, context=lambda: 5).turn(job(max_new_tokens=100), draft())
    assert script.asked[0].sampling["max_new_tokens"] == 3
    assert ending.outcome is Outcome.TRUNCATED


def test_a_prompt_as_long_as_the_context_is_refused_with_both_lengths():
    sampler = make(Script(AWAY), context=lambda: 4)
    sampler.check_prompt(np.zeros(3, np.int32))
    with pytest.raises(InvalidArgument, match=r"4 tokens .* context of 4 tokens"):
        sampler.check_prompt(np.zeros(4, np.int32))
    with pytest.raises(InvalidArgument, match="no tokens"):
        sampler.check_prompt(np.zeros(0, np.int32))


async def test_the_deadline_of_a_request_that_hangs():
    class Hangs(Script):
        async def generate(self, request: GenerateRequest, *, timeout_s: float) -> Generation:
            async with asyncio.timeout(timeout_s):
                await asyncio.Event().wait()
            raise AssertionError

    ending = await make(Hangs(AWAY), timeout_s=0.05).turn(job(), draft())
    assert ending.outcome is Outcome.ENGINE_ERROR
    assert "0.05 s" in ending.error
