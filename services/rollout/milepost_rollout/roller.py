"""Rolls one prompt out: its samples side by side, then their scores. Knows nothing of leases and streams.

prompt --encode--> tokens --+--> sample 0 --+--> score --> samples, ordered by index
                            +--> sample 1 --+
                            `--> ...        |
                                            `--> with `fail_fast`, the first error ends the others
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from milepost.errors import InvalidArgument
from milepost.types import Int32Array, Outcome, Prompt, Sample, SamplingParams
from milepost_common.metrics import Instrument
from milepost_common.telemetry import tracing
from milepost_rollout.capacity import Priority
from milepost_rollout.draft import Draft
from milepost_rollout.episode import EpisodeRunner
from milepost_rollout.rewards.contract import Score
from milepost_rollout.rewards.names import read_name
from milepost_rollout.rewards.scorer import Scorer
from milepost_rollout.sampler import SampleJob, Sampler
from milepost_rollout.sampling import resolve
from milepost_rollout.status import Counters
from milepost_rollout.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class RollRequest:
    """A prompt and how to roll it out.

    Attributes:
      sampling: of prompts that do not override it.
      reward: of prompts that name none; empty scores nothing.
      session: names the rollout, for episodes and for engines that keep a session's cache.
      fail_fast: end at the first sample with an error outcome.
    """

    prompt: Prompt
    num_samples: int
    sampling: SamplingParams | None = None
    reward: str = ""
    run_id: str = ""
    min_version: int = 0
    version: int = 0
    session: str = ""
    fail_fast: bool = False
    priority: Priority = Priority.TRAINING


class GroupRoller:
    """Rolls prompts out; shared by training, evaluation and streams.

    Args:
      sampler: makes turns of samples.
      scorer: scores them.
      tokenizer: needed for prompts that are not token ids, and for rewards that read text.
      counters: told of every sample.
      episodes: plays episodes instead of single turns.
    """

    def __init__(
        self,
        *,
        sampler: Sampler,
        scorer: Scorer,
        tokenizer: Tokenizer | None,
        counters: Counters,
        episodes: EpisodeRunner | None = None,
    ) -> None:
        self._sampler = sampler
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._counters = counters
        self._episodes = episodes

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """What its parts count, as metrics."""
        return (*self._sampler.slots.instruments, self._scorer.seconds, self._scorer.errors)

    async def roll(
        self, request: RollRequest, *, on_generated: Callable[[], None] = lambda: None
    ) -> tuple[Sample, ...]:
        """Makes and scores the samples of a prompt.

        Args:
          request: the prompt and how to roll it out.
          on_generated: called when a sample is generated, before it is scored.

        Returns:
          The samples, ordered by index; with `fail_fast` and an error among them, those that had ended.

        Raises:
          InvalidArgument: the prompt can never be rolled out; names field, value and remedy.
          EnginesUnavailable: nobody could be asked.
        """
        _check_metadata(request.prompt)
        self._check_reward(request)
        ids = self._encode(request.prompt)
        if self._episodes is None:
            self._sampler.check_prompt(ids)
        samples = await self._sample_all(request, ids, on_generated)
        if not (request.fail_fast and any(s.outcome.is_error for s in samples)):
            samples = await self._score(request, samples)
        for sample in samples:
            self._counters.sampled(sample)
        return tuple(samples)

    def _check_reward(self, request: RollRequest) -> None:
        reward = read_name(request.prompt.reward or request.reward)
        if reward.reads_text and self._tokenizer is None:
            raise InvalidArgument(
                f"reward {reward.name!r} reads text, but the gateway has no tokenizer; set rollout.tokenizer",
                reason="NO_TOKENIZER",
            )

    def _encode(self, prompt: Prompt) -> Int32Array:
        if prompt.input_ids is not None:
            return np.asarray(prompt.input_ids, dtype=np.int32)
        if self._tokenizer is None:
            raise InvalidArgument(
                "prompt: it is text, but the gateway has no tokenizer; set rollout.tokenizer to the model's "
                "folder, or put input_ids",
                reason="NO_TOKENIZER",
            )
        if prompt.messages is not None:
            return self._tokenizer.encode_chat(prompt.messages)
        if prompt.text is None:
            raise InvalidArgument("prompt: it has no input; set text, chat or input_ids", reason="NO_INPUT")
        return self._tokenizer.encode(prompt.text)

    async def _sample_all(
        self, request: RollRequest, ids: Int32Array, on_generated: Callable[[], None]
    ) -> list[Sample]:
        tasks = [asyncio.create_task(self._sample(request, ids, i)) for i in range(request.num_samples)]
        self._counters.samples_in_flight += len(tasks)
        done: list[Sample] = []
        try:
            for finished in asyncio.as_completed(tasks):
                done.append(await finished)
                self._counters.samples_in_flight -= 1
                on_generated()
                if request.fail_fast and done[-1].outcome.is_error:
                    break
        finally:
            self._counters.samples_in_flight -= len(tasks) - len(done)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return sorted(done, key=lambda s: s.index)

    async def _sample(self, request: RollRequest, ids: Int32Array, index: int) -> Sample:
        prompt_id = request.prompt.prompt_id
        with tracing.span(
            "gateway.generate", run_id=request.run_id, prompt_id=prompt_id, sample=index
        ) as span:
            sample = await self._generate(request, ids, index)
            if not span:
                return sample
            span.set(
                outcome=sample.outcome.name.lower(),
                engine_id=sample.engine_id,
                version=sample.version_spans[-1].weight_version if sample.version_spans else None,
                num_tokens=len(sample.tokens),
            )
            return replace(sample, traceparent=span.traceparent)

    async def _generate(self, request: RollRequest, ids: Int32Array, index: int) -> Sample:
        job = SampleJob(
            prompt_id=request.prompt.prompt_id,
            index=index,
            sampling=resolve(request.prompt.sampling, request.sampling),
            run_id=request.run_id,
            min_version=request.min_version,
            version=request.version,
            session=request.session if self._episodes else "",
            priority=request.priority,
        )
        if self._episodes is not None:
            return await self._episodes.run(job, request.prompt)
        draft, started = Draft(ids), time.perf_counter()
        ending = await self._sampler.turn(job, draft)
        self._counters.sample_seconds.record(time.perf_counter() - started)
        text = self._text(draft.response, ending.matched)
        return draft.finish(index=index, outcome=ending.outcome, text=text, error=ending.error)

    def _text(self, response: Int32Array, matched: str | int | None) -> str:
        if self._tokenizer is None or not len(response):
            return ""
        text = self._tokenizer.decode(response)
        if isinstance(matched, str) and (at := text.rfind(matched)) >= 0:
            return text[:at]
        return text

    async def _score(self, request: RollRequest, samples: Sequence[Sample]) -> list[Sample]:
        prompt = request.prompt
        name = prompt.reward or ("" if self._episodes is not None else request.reward)
        scored = [s for s in samples if not s.outcome.is_error]
        if not name:
            return list(samples)
        with tracing.span(
            "gateway.reward", run_id=request.run_id, prompt_id=prompt.prompt_id, reward=name
        ) as span:
            scores = await self._scorer.score(
                name, prompt, prompt_text=lambda: self._prompt_text(prompt, samples), samples=scored
            )
            if failed := [score.error for score in scores if score.error]:
                span.fail(failed[0])
        by_index = {s.index: apply_score(s, score) for s, score in zip(scored, scores, strict=True)}
        return [by_index.get(s.index, s) for s in samples]

    def _prompt_text(self, prompt: Prompt, samples: Sequence[Sample]) -> str:
        if prompt.text is not None:
            return prompt.text
        if self._tokenizer is None:
            return ""
        if prompt.messages is not None:
            return self._tokenizer.render(prompt.messages)
        return self._tokenizer.decode(samples[0].tokens[: samples[0].prompt_length], skip_special=False)


def apply_score(sample: Sample, score: Score) -> Sample:
    """The sample with its reward; without one its outcome is REWARD_ERROR and nothing of it is trained on."""
    if not score.error:
        reward = score.reward if sample.reward != sample.reward else sample.reward + score.reward
        return replace(sample, reward=reward, reward_parts=score.parts)
    return replace(
        sample,
        outcome=Outcome.REWARD_ERROR,
        error=score.error,
        reward=float("nan"),
        loss_mask=np.zeros_like(sample.loss_mask),
        logprobs=np.zeros_like(sample.logprobs),
    )


def _check_metadata(prompt: Prompt) -> None:
    if not prompt.metadata_json:
        return
    try:
        fits = isinstance(json.loads(prompt.metadata_json), dict)
    except ValueError:
        fits = False
    if not fits:
        raise InvalidArgument(
            f"prompt.metadata_json is {prompt.metadata_json[:60]!r}, not a JSON object; mend it",
            reason="BAD_METADATA",
        )
