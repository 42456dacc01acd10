"""Rewards by name: where each runs, and what remote ones may answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from milepost.errors import InvalidArgument, Unavailable
from milepost.types import Outcome, Prompt, RewardParts, Sample, Scores
from milepost_rollout.rewards.names import Kind, read_name
from milepost_rollout.rewards.pool import WorkerPool
from milepost_rollout.rewards.scorer import Scorer


@pytest.mark.parametrize(
    "name, kind",
    [
        ("", Kind.NONE),
        ("exact", Kind.INLINE),
        ("math", Kind.WORKER),
        ("regex:a:b", Kind.WORKER),
        ("my.module:Class.method", Kind.WORKER),
        ("grpc://judge:50051", Kind.REMOTE),
        ("grpc://[::1]:50051", Kind.REMOTE),
    ],
)
def test_names(name: str, kind: Kind):
    assert read_name(name).kind is kind


@pytest.mark.parametrize(
    "name, said",
    [
        ("exct", "did you mean 'exact'?"),
        ("my reward", "module:function"),
        ("regex:(", "cannot be compiled"),
        ("grpc://judge", "grpc://host:port"),
        ("a:b:c", "use one of"),
    ],
)
def test_wrong_names_say_what_is_known(name: str, said: str):
    with pytest.raises(InvalidArgument) as caught:
        read_name(name)
    assert said in str(caught.value)
    assert repr(name) in str(caught.value)


def sample(index: int, text: str) -> Sample:
    tokens = np.array([1, 2], np.int32)
    return Sample(index=index, tokens=tokens, prompt_length=1, text=text, outcome=Outcome.COMPLETED)


class Remote:
    """A reward service that answers as told."""

    def __init__(self, answer: Scores | Exception | None) -> None:
        self.answer = answer
        self.asked: list[list[str]] = []

    async def score(self, prompt: Prompt, *, samples: Sequence[Sample], timeout_s: float | None) -> Scores:
        self.asked.append([s.text for s in samples])
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer

    async def close(self) -> None:
        pass


async def score(name: str, *texts: str, remote: Remote | None = None):
    scorer = Scorer(
        WorkerPool(size=1, timeout_s=1.0), timeout_s=0.05, connect=lambda address: remote or Remote(None)
    )
    prompt = Prompt(prompt_id="p", text="1+1=", label=" 2 ")
    samples = [sample(i, t) for i, t in enumerate(texts)]
    try:
        return await scorer.score(name, prompt, prompt_text=lambda: "1+1=", samples=samples)
    finally:
        await scorer.close()


async def test_exact_compares_stripped():
    assert [s.reward for s in await score("exact", "2", "2\n", "3", "")] == [1, 1, 0, 0]


async def test_no_reward_is_nan_and_no_error():
    (only,) = await score("", "2")
    assert only.reward != only.reward
    assert only.error == ""


async def test_remote_rewards_and_parts():
    answer = Scores(rewards=(0.5, 1.5), parts=(RewardParts(parts={"a": 1.0}), RewardParts()))
    remote = Remote(answer)
    first, second = await score("grpc://judge:1", "x", "y", remote=remote)
    assert (first.reward, second.reward) == (0.5, 1.5)
    assert first.parts == {"a": 1.0}
    assert remote.asked == [["x", "y"]]


@pytest.mark.parametrize(
    "answer, said",
    [
        (Scores(rewards=(1.0,)), "answered 1 rewards"),
        (Scores(rewards=(1.0, 1.0), parts=(RewardParts(),)), "1 parts for 2 samples"),
        (Unavailable("judge:1: nobody there"), "Unavailable: judge:1: nobody there"),
        (None, "no answer within 0.05 s"),
    ],
)
async def test_what_a_remote_reward_may_do_wrong(answer: Scores | Exception | None, said: str):
    for s in await score("grpc://judge:1", "x", "y", remote=Remote(answer)):
        assert said in s.error
        assert "reward 'grpc://judge:1', prompt 'p'" in s.error


async def test_a_remote_nan_is_an_error_of_its_sample():
    first, second = await score("grpc://j:1", "x", "y", remote=Remote(Scores(rewards=(1.0, float("nan")))))
    assert first.reward == 1.0
    assert "rewards[1] is nan" in second.error
