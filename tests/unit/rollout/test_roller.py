"""Prompts to scored samples, streams and evaluations, over an engine that answers as told."""

# ruff: noqa: ASYNC110  # polled with a deadline: what is waited for has no event of its own

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from milepost.errors import InvalidArgument, NotFound, Unavailable
from milepost.types import (
    ChatMessage,
    EnvironmentTurn,
    Outcome,
    Prompt,
    RolloutOptions,
    RunConfig,
    SamplingParams,
    VersionSpan,
    WeightVersion,
)
from milepost_rollout.capacity import SampleSlots
from milepost_rollout.engine_client import EngineFailed, GenerateRequest
from milepost_rollout.episode import EpisodeLimits, EpisodeRunner
from milepost_rollout.evaluate import EvaluationRequest, Evaluator, PeriodicEvaluation, load_prompts
from milepost_rollout.replies import Generation
from milepost_rollout.rewards.pool import WorkerPool
from milepost_rollout.rewards.scorer import Scorer
from milepost_rollout.roller import GroupRoller, RollRequest
from milepost_rollout.sampler import Sampler, SamplerSettings
from milepost_rollout.status import Counters
from milepost_rollout.stream import RolloutStream
from milepost_rollout.tokenizer import Tokenizer

USER_REWARDS = str(Path(__file__).parent)


class FakeModel:
    """An engine client whose model answers a text with a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.answer: Callable[[str], str | Exception] = lambda prompt: "2<|end|>"
        self.asked: list[tuple[str, GenerateRequest]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.version = 7

    async def generate(self, request: GenerateRequest, *, timeout_s: float) -> Generation:
        text = self.tokenizer.decode(request.input_ids, skip_special=False)
        self.asked.append((text, request))
        await self.gate.wait()
        answer = self.answer(text)
        if isinstance(answer, Exception):
            raise answer
        ids = self.tokenizer.encode(answer, special=False)
        return Generation(
            output_ids=ids,
            logprobs=np.full(len(ids), -0.5, np.float32),
            spans=(VersionSpan(start=0, end=len(ids), weight_version=self.version),),
            exact=True,
            finish="stop" if answer.endswith("<|end|>") else "length",
        )


class Setup:
    def __init__(self, tokenizer: Tokenizer, *, environment: Any = None, context: int = 0) -> None:
        self.model = FakeModel(tokenizer)
        self.counters = Counters()
        self.scorer = Scorer(WorkerPool(size=1, timeout_s=60, reward_path=[USER_REWARDS]), timeout_s=60)
        sampler = Sampler(
            self.model,  # type: ignore[arg-type]
            slots=SampleSlots(16),
            settings=SamplerSettings(attempts=1, timeout_s=60),
            counters=self.counters,
            context_length=lambda: context,
        )
        episodes = environment and EpisodeRunner(
            environment,
            sampler=sampler,
            tokenizer=tokenizer,
            limits=EpisodeLimits(max_turns=3, timeout_s=0.1),
        )
        self.roller = GroupRoller(
            sampler=sampler,
            scorer=self.scorer,
            tokenizer=tokenizer,
            counters=self.counters,
            episodes=episodes,
        )


@pytest.fixture
async def setup(tokenizer: Tokenizer) -> AsyncIterator[Setup]:
    s = Setup(tokenizer)
    yield s
    await s.scorer.close()


def request(prompt: Prompt, **more: Any) -> RollRequest:
    return RollRequest(**{"prompt": prompt, "num_samples": 2, "reward": "exact", **more})


TEXT = Prompt(prompt_id="p", text="1+1=", label="2")


async def test_a_text_prompt(setup: Setup, tokenizer: Tokenizer):
    samples = await setup.roller.roll(request(TEXT, run_id="r", min_version=7))
    assert [s.index for s in samples] == [0, 1]
    for s in samples:
        assert (s.outcome, s.reward, s.text) == (Outcome.COMPLETED, 1.0, "2")
        assert tokenizer.decode(s.tokens, skip_special=False) == "1+1=2<|end|>"
        assert s.loss_mask.tolist() == [0, 0, 0, 0, 1, 1]
    assert {a.rid for _, a in setup.model.asked}.__len__() == 2
    assert setup.counters.outcomes == {"completed": 2}
    assert setup.counters.tokens_generated == 4
    assert setup.counters.samples_in_flight == 0


async def test_a_conversation_goes_through_the_template(setup: Setup):
    chat = Prompt(prompt_id="p", messages=(ChatMessage(role="user", content="1+1?"),), label="2")
    await setup.roller.roll(request(chat))
    assert setup.model.asked[0][0] == "<|start|>user\n1+1?<|end|>\n<|start|>assistant\n"


async def test_token_ids_go_as_they_are(setup: Setup):
    ids = np.array([3, 1, 4], np.int32)
    (first, _) = await setup.roller.roll(request(Prompt(prompt_id="p", input_ids=ids)))
    assert first.tokens[:3].tolist() == [3, 1, 4]


async def test_sampling_overrides(setup: Setup):
    prompt = Prompt(prompt_id="p", text="x", sampling=SamplingParams(temperature=0.25, stop=("!",)))
    run = SamplingParams(temperature=0.5, top_p=0.9, max_new_tokens=5, seed=3)
    await setup.roller.roll(request(prompt, sampling=run))
    sent = sorted((a.sampling for _, a in setup.model.asked), key=lambda x: x["sampling_seed"])
    assert [s["sampling_seed"] for s in sent] == [3, 4]
    assert sent[0] == {
        "temperature": 0.25,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.0,
        "max_new_tokens": 5,
        "ignore_eos": False,
        "stop": ("!",),
        "sampling_seed": 3,
    }


async def test_a_failed_reward_is_never_a_zero(setup: Setup):
    samples = await setup.roller.roll(request(TEXT, reward="user_rewards:raises_at_1", num_samples=3))
    assert [s.outcome for s in samples] == [Outcome.COMPLETED, Outcome.REWARD_ERROR, Outcome.COMPLETED]
    bad = samples[1]
    assert bad.reward != bad.reward
    assert not bad.loss_mask.any()
    assert not bad.logprobs.any()
    assert "cannot read the answer" in bad.error


async def test_the_prompts_own_reward_wins(setup: Setup):
    prompt = Prompt(prompt_id="p", text="x", label="9", reward="regex:2")
    samples = await setup.roller.roll(request(prompt))
    assert [s.reward for s in samples] == [1.0, 1.0]


async def test_fail_fast_ends_the_others(setup: Setup):
    held = asyncio.Event()
    real = setup.model.generate

    async def generate(asked: GenerateRequest, *, timeout_s: float) -> Generation:
        if asked.sampling.get("sampling_seed") == 0:
            raise EngineFailed("engine e0: output_ids is missing")
        await held.wait()
        return await real(asked, timeout_s=timeout_s)

    setup.model.generate = generate  # type: ignore[method-assign]
    run = SamplingParams(seed=0)
    samples = await asyncio.wait_for(setup.roller.roll(request(TEXT, sampling=run, fail_fast=True)), 30)
    assert [s.outcome for s in samples] == [Outcome.ENGINE_ERROR]
    assert "output_ids is missing" in samples[0].error
    assert setup.counters.samples_in_flight == 0


@pytest.mark.parametrize(
    "prompt, said",
    [
        (Prompt(prompt_id="p"), "no input"),
        (Prompt(prompt_id="p", text="x" * 20), r"20 tokens .* context of 10"),
        (Prompt(prompt_id="p", text="x", metadata_json="[1]"), "metadata_json"),
        (Prompt(prompt_id="p", text="x", metadata_json="{oops"), "metadata_json"),
        (Prompt(prompt_id="p", text="x", reward="exct"), "did you mean 'exact'"),
        (Prompt(prompt_id="p", input_ids=np.empty(0, np.int32)), "no tokens"),
    ],
)
async def test_prompts_that_can_never_be_rolled_out(tokenizer: Tokenizer, prompt: Prompt, said: str):
    s = Setup(tokenizer, context=10)
    with pytest.raises(InvalidArgument, match=said):
        await s.roller.roll(request(prompt))


async def test_without_a_tokenizer_text_is_refused_and_never_scored_as_empty(
    setup: Setup, tokenizer: Tokenizer
):
    roller = GroupRoller(
        sampler=setup.roller._sampler, scorer=setup.scorer, tokenizer=None, counters=setup.counters
    )
    ids = Prompt(prompt_id="p", input_ids=np.array([1, 2], np.int32))
    with pytest.raises(InvalidArgument, match=r"reward 'exact' reads text.*rollout\.tokenizer"):
        await roller.roll(request(ids))
    with pytest.raises(InvalidArgument, match=r"it is text.*rollout\.tokenizer"):
        await roller.roll(request(TEXT, reward=""))
    (first, _) = await roller.roll(request(ids, reward="user_rewards:everything_is_one"))
    assert first.reward == 1.0


# ---------------------------------------------------------------------------------------------- streams


async def prompts_of(*prompts: Prompt) -> AsyncIterator[Prompt]:
    for p in prompts:
        yield p


def stream(setup: Setup, *, limit: int = 4, **options: Any) -> RolloutStream:
    return RolloutStream(setup.roller, options=RolloutOptions(**options), limit=limit, name="s")


async def test_a_stream_answers_every_prompt(setup: Setup):
    prompts = [Prompt(prompt_id=f"p{i}", text=f"{i}", label="2") for i in range(10)]
    bad = Prompt(prompt_id="bad", text="x", reward="exct")
    got = [
        t async for t in stream(setup, reward="exact", samples_per_prompt=2).run(prompts_of(*prompts, bad))
    ]
    assert {t.prompt_id for t in got} == {p.prompt_id for p in prompts} | {"bad"}
    by_id = {t.prompt_id: t for t in got}
    assert "did you mean" in by_id["bad"].error
    assert [len(by_id[f"p{i}"].samples) for i in range(10)] == [2] * 10
    assert by_id["p3"].samples[0].reward == 1.0


async def test_a_stream_without_a_reward_scores_nothing(setup: Setup):
    (only,) = [t async for t in stream(setup).run(prompts_of(TEXT))]
    assert len(only.samples) == 1
    assert only.samples[0].reward != only.samples[0].reward
    assert only.samples[0].outcome is Outcome.COMPLETED


async def test_a_slow_caller_slows_the_source(setup: Setup):
    taken: list[str] = []

    async def source() -> AsyncIterator[Prompt]:
        for i in range(100):
            taken.append(f"p{i}")
            yield Prompt(prompt_id=f"p{i}", text="x")

    running = stream(setup, limit=3).run(source())
    await anext(running)
    for _ in range(300):
        await asyncio.sleep(0)
    assert len(taken) <= 6
    await running.aclose()  # type: ignore[attr-defined]
    assert setup.counters.samples_in_flight == 0


async def test_a_source_that_breaks_ends_the_stream(setup: Setup):
    async def source() -> AsyncIterator[Prompt]:
        yield TEXT
        raise Unavailable("the caller went away")

    with pytest.raises(Unavailable):
        async for _ in stream(setup).run(source()):
            pass


async def test_a_stream_may_be_pinned(setup: Setup):
    (only,) = [t async for t in stream(setup, weight_version=6).run(prompts_of(TEXT))]
    assert only.samples[0].outcome is Outcome.ABORTED
    assert not only.samples[0].loss_mask.any()


# ---------------------------------------------------------------------------------------------- evaluation


class FakeVersions:
    """Versions that a test publishes."""

    def __init__(self) -> None:
        self.published: list[WeightVersion] = []
        self.changed = asyncio.Condition()

    async def publish(self, version: int, label: int) -> None:
        async with self.changed:
            self.published.append(WeightVersion(version=version, label=label))
            self.changed.notify_all()

    async def get_version(self, run_id: str, *, version: int = 0) -> WeightVersion:
        for v in reversed(self.published):
            if version in (0, v.version):
                return v
        raise NotFound(f"version {version}")

    async def watch_versions(
        self, run_id: str, *, after_version: int = 0, max_wait_s: float = 60.0
    ) -> AsyncIterator[WeightVersion]:
        last = after_version
        while True:
            async with self.changed:
                while not self.published or self.published[-1].version <= last:
                    await self.changed.wait()
                newest = self.published[-1]
            last = newest.version
            yield newest


def evaluator(setup: Setup, versions: FakeVersions, **more: Any) -> Evaluator:
    config = RunConfig(reward="exact", sampling=SamplingParams(temperature=1.0, max_new_tokens=3))

    async def read() -> RunConfig:
        return config

    return Evaluator(
        roller=setup.roller,
        config=read,
        counters=setup.counters,
        versions=versions,
        run_id="r",
        **more,
    )


async def test_an_evaluation_is_pinned_greedy_and_counted(setup: Setup):
    versions = FakeVersions()
    await versions.publish(7, 30)
    held = [Prompt(prompt_id=f"h{i}", text=f"{i}", label="2" if i < 3 else "3") for i in range(4)]
    result = await evaluator(setup, versions).evaluate(EvaluationRequest(prompts=held))
    assert (result.weight_version, result.weight_label) == (7, 30)
    assert result.reward_mean == 0.75
    assert (result.num_scored, result.num_requested) == (4, 4)
    assert result.response_tokens_mean == 2
    for _, asked in setup.model.asked:
        assert (asked.version, asked.run_id) == (7, "r")
        assert asked.sampling["temperature"] == 0
        assert asked.sampling["max_new_tokens"] == 3
    assert setup.counters.last_evaluation == result


async def test_samples_whose_version_went_away_are_counted_as_aborted(setup: Setup):
    versions = FakeVersions()
    await versions.publish(6, 5)
    held = [Prompt(prompt_id="a", text="1", label="2"), Prompt(prompt_id="b", text="x", reward="exct")]
    result = await evaluator(setup, versions).evaluate(EvaluationRequest(prompts=held, samples_per_prompt=2))
    assert result.failures == {"aborted": 2, "invalid": 2}
    assert (result.num_scored, result.num_requested) == (0, 4)
    assert result.reward_mean != result.reward_mean, "no mean of nothing"


async def test_an_evaluation_ends_in_time(setup: Setup):
    versions = FakeVersions()
    await versions.publish(7, 0)
    setup.model.gate.clear()
    result = await evaluator(setup, versions, prompts=[TEXT]).evaluate(EvaluationRequest(timeout_s=0.05))
    assert result.failures == {"aborted": 1}
    assert setup.counters.samples_in_flight == 0


async def test_an_evaluation_needs_prompts_and_a_version(setup: Setup):
    versions = FakeVersions()
    with pytest.raises(NotFound):
        await evaluator(setup, versions, prompts=[TEXT]).evaluate(EvaluationRequest())
    await versions.publish(7, 0)
    with pytest.raises(InvalidArgument, match=r"rollout\.evaluate\.prompts"):
        await evaluator(setup, versions).evaluate(EvaluationRequest())


async def test_every_n_steps_the_newest_version_is_evaluated(setup: Setup, tmp_path: Path):
    versions = FakeVersions()
    results = tmp_path / "runs" / "r" / "eval.jsonl"
    periodic = PeriodicEvaluation(
        evaluator(setup, versions, prompts=[TEXT]),
        versions=versions,
        run_id="r",
        every_steps=10,
        request=EvaluationRequest(),
        results=results,
    )
    task = asyncio.create_task(periodic.run())

    async def evaluated(label: int) -> None:
        async with asyncio.timeout(30):
            while not (
                results.exists() and f'"weight_label": {label}' in results.read_text().rpartition("\n")[0]
            ):
                await asyncio.sleep(0.005)

    try:
        setup.model.version = 1
        await versions.publish(1, 0)
        await evaluated(0)
        for step in range(1, 10):
            await versions.publish(step + 1, step)
        setup.model.version = 13
        await versions.publish(13, 12)
        await evaluated(12)
        await versions.publish(20, 19)
        setup.model.version = 21
        await versions.publish(21, 20)
        await evaluated(20)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["weight_label"] for line in lines] == [0, 12, 20]
    assert [line["weight_version"] for line in lines] == [1, 13, 21]
    assert all(line["reward_mean"] == 1.0 and line["run_id"] == "r" for line in lines)


async def test_a_version_that_went_away_is_followed_by_the_newest(setup: Setup, tmp_path: Path):
    versions = FakeVersions()
    results = tmp_path / "eval.jsonl"
    evaluating = evaluator(setup, versions, prompts=[TEXT])
    periodic = PeriodicEvaluation(
        evaluating,
        versions=versions,
        run_id="r",
        every_steps=10,
        request=EvaluationRequest(),
        results=results,
    )
    setup.model.gate.clear()
    task = asyncio.create_task(periodic.run())
    try:
        async with asyncio.timeout(30):
            await versions.publish(1, 0)
            while not setup.model.asked:
                await asyncio.sleep(0.005)
            await versions.publish(2, 1)
            for _ in range(20):
                await asyncio.sleep(0)
            setup.model.version = 2
            setup.model.gate.set()
            while not results.exists() or not results.read_text().endswith("\n"):
                await asyncio.sleep(0.005)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    (line,) = (json.loads(x) for x in results.read_text().splitlines())
    assert (line["weight_version"], line["num_scored"], line["reward_mean"]) == (2, 1, 1.0)
    assert setup.counters.last_evaluation is not None
    assert setup.counters.last_evaluation.weight_version == 2


def test_held_out_prompts_do_not_shrink_in_silence(tmp_path: Path):
    path = tmp_path / "held.jsonl"
    with pytest.raises(InvalidArgument, match="name a JSONL file"):
        load_prompts(path)
    path.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    with pytest.raises(InvalidArgument, match=r"line 2: promt.*did you mean 'prompt'"):
        load_prompts(path)
    path.write_text('{"prompt": "a"}\n')
    assert [p.prompt_id for p in load_prompts(path)] == ["held/0/0"]


# ---------------------------------------------------------------------------------------------- episodes


class Guessing:
    """An environment: guess a number; it says higher until the model says 3."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.behaviour: Callable[[str], EnvironmentTurn | Exception | None] = self.play

    def play(self, text: str) -> EnvironmentTurn:
        if text == "3":
            return EnvironmentTurn(done=True, reward=1.0)
        return EnvironmentTurn(messages=(ChatMessage(role="user", content="higher"),), reward=-0.25)

    async def reset(
        self, episode_id: str, *, prompt: Prompt, timeout_s: float | None
    ) -> tuple[ChatMessage, ...]:
        return (ChatMessage(role="user", content="guess"),)

    async def step(self, episode_id: str, *, text: str, timeout_s: float | None) -> EnvironmentTurn:
        self.said.append(text)
        answer = self.behaviour(text)
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        return answer


CHAT = Prompt(prompt_id="p", messages=(ChatMessage(role="system", content="play"),))


async def test_an_episode_masks_what_the_environment_says(tokenizer: Tokenizer):
    environment = Guessing()
    s = Setup(tokenizer, environment=environment)
    s.model.answer = lambda text: "3<|end|>" if "higher" in text else "1<|end|>"
    (sample,) = await s.roller.roll(request(CHAT, num_samples=1, session="s"))
    assert environment.said == ["1", "3"]
    assert (sample.outcome, sample.reward) == (Outcome.COMPLETED, 0.75)
    start = "<|start|>system\nplay<|end|>\n<|start|>user\nguess<|end|>\n<|start|>assistant\n"
    between = "\n<|start|>user\nhigher<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(sample.tokens, skip_special=False) == f"{start}1<|end|>{between}3<|end|>"
    trained = sample.tokens[sample.loss_mask == 1]
    assert tokenizer.decode(trained, skip_special=False) == "1<|end|>3<|end|>"
    assert not sample.logprobs[sample.loss_mask == 0].any()
    assert {a.session for _, a in s.model.asked} == {"s"}


async def test_an_episode_without_end_is_truncated(tokenizer: Tokenizer):
    s = Setup(tokenizer, environment=Guessing())
    s.model.answer = lambda text: "1<|end|>"
    (sample,) = await s.roller.roll(request(CHAT, num_samples=1))
    assert (sample.outcome, sample.reward) == (Outcome.TRUNCATED, -0.75)
    assert len(s.model.asked) == 3


@pytest.mark.parametrize(
    "answer, said",
    [
        (Unavailable("env:1: gone"), "Step raised Unavailable: env:1: gone"),
        (None, "Step did not answer within 0.1 s"),
        (EnvironmentTurn(reward=float("nan")), "reward nan"),
    ],
)
async def test_an_environment_that_fails(
    tokenizer: Tokenizer, answer: EnvironmentTurn | Exception | None, said: str
):
    environment = Guessing()
    environment.behaviour = lambda text: answer
    s = Setup(tokenizer, environment=environment)
    (sample,) = await s.roller.roll(request(CHAT, num_samples=1))
    assert sample.outcome is Outcome.ENV_ERROR
    assert said in sample.error
    assert not sample.loss_mask.any()
    assert sample.reward != sample.reward
