"""Multi-turn episodes: the model and an EnvironmentService of the user's take turns.

    Reset(prompt) -> messages --> the model's turn --> Step(text) -> messages --> ... --> done

What the environment says is appended as tokens with mask 0 between what the model wrote; the model's own
tokens are never encoded again. Turn rewards add up to the sample's reward. An environment that raises, hangs
or breaks its contract is the outcome ENV_ERROR.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from milepost.errors import MilepostError
from milepost.types import ChatMessage, EnvironmentTurn, Int32Array, Outcome, Prompt, Sample
from milepost_rollout.draft import Draft
from milepost_rollout.sampler import Ending, SampleJob, Sampler
from milepost_rollout.tokenizer import Tokenizer

T = TypeVar("T")


class Environment(Protocol):
    """What is asked of an environment; `milepost.client.EnvironmentClient` is one."""

    async def reset(
        self, episode_id: str, *, prompt: Prompt, timeout_s: float | None
    ) -> tuple[ChatMessage, ...]:
        """Starts an episode."""
        ...

    async def step(self, episode_id: str, *, text: str, timeout_s: float | None) -> EnvironmentTurn:
        """Answers the model."""
        ...


class EnvironmentFailed(Exception):
    """The environment raised, hung or broke its contract."""


@dataclass(frozen=True, kw_only=True)
class EpisodeLimits:
    """Limits of an episode: turns of the model, and time for each answer of the environment."""

    max_turns: int = 16
    timeout_s: float = 60.0


class EpisodeRunner:
    """Runs episodes of one environment.

    Args:
      environment: the other side.
      sampler: makes the model's turns.
      tokenizer: turns messages into tokens and tokens into text.
      limits: see `EpisodeLimits`.
    """

    def __init__(
        self, environment: Environment, *, sampler: Sampler, tokenizer: Tokenizer, limits: EpisodeLimits
    ) -> None:
        self._environment = environment
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._limits = limits

    async def run(self, job: SampleJob, prompt: Prompt) -> Sample:
        """Plays one episode and returns it as a sample with the environment's reward.

        Raises:
          InvalidArgument: the prompt cannot be rendered or does not fit the context.
          EnginesUnavailable: nobody could be asked.
        """
        episode_id = f"{job.session}/{job.index}"
        draft, reward, ending = None, 0.0, None
        try:
            opening = await self._answer(
                self._environment.reset(episode_id, prompt=prompt, timeout_s=self._limits.timeout_s), "Reset"
            )
            draft = Draft(self._first_tokens(prompt, opening))
            self._sampler.check_prompt(draft.tokens)
            for _ in range(self._limits.max_turns):
                ending, turn = await self._exchange(episode_id, job, draft)
                reward += turn.reward
                if turn.done or ending.outcome is not Outcome.COMPLETED:
                    return self._finish(job, draft, ending, reward)
                last_token = int(draft.tokens[-1])
                draft.add_environment(self._tokens_between(prompt, turn.messages, last_token))
            return self._finish(job, draft, Ending(outcome=Outcome.TRUNCATED), reward)
        except EnvironmentFailed as error:
            what = f"prompt {job.prompt_id!r}, sample {job.index}: {error}"
            draft = draft or Draft(prompt.input_ids if prompt.input_ids is not None else _no_tokens())
            return self._finish(job, draft, Ending(outcome=Outcome.ENV_ERROR, error=what), math.nan)

    async def _exchange(
        self, episode_id: str, job: SampleJob, draft: Draft
    ) -> tuple[Ending, EnvironmentTurn]:
        """One turn of the model and the environment's answer to it."""
        start = draft.length
        ending = await self._sampler.turn(job, draft)
        if ending.outcome.is_error:
            return ending, EnvironmentTurn(done=True)
        text = self._tokenizer.decode(draft.tokens[start:])
        if isinstance(ending.matched, str) and (at := text.rfind(ending.matched)) >= 0:
            text = text[:at]
        answer = self._environment.step(episode_id, text=text, timeout_s=self._limits.timeout_s)
        turn = await self._answer(answer, "Step")
        if not math.isfinite(turn.reward):
            raise EnvironmentFailed(
                f"environment: Step answered reward {turn.reward}; answer a finite number"
            )
        if turn.done and ending.outcome is Outcome.TRUNCATED:
            ending = replace(ending, outcome=Outcome.COMPLETED)
        return ending, turn

    async def _answer(self, asked: Awaitable[T], rpc: str) -> T:
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return await asked
        except TimeoutError:
            limit_s = self._limits.timeout_s
            raise EnvironmentFailed(
                f"environment: {rpc} did not answer within {limit_s:g} s (rollout.environment_timeout_s)"
            ) from None
        except MilepostError as error:
            raise EnvironmentFailed(f"environment: {rpc} raised {type(error).__name__}: {error}") from error

    def _first_tokens(self, prompt: Prompt, opening: Sequence[ChatMessage]) -> Int32Array:
        if prompt.messages is not None:
            return self._tokenizer.encode_chat((*prompt.messages, *opening))
        said = "".join(m.content for m in opening)
        if prompt.text is not None:
            return self._tokenizer.encode(prompt.text + said)
        ids = prompt.input_ids if prompt.input_ids is not None else _no_tokens()
        return _join(ids, self._tokenizer.encode(said, special=False)) if said else ids

    def _tokens_between(self, prompt: Prompt, messages: Sequence[ChatMessage], last_token: int) -> Int32Array:
        if prompt.messages is not None:
            return self._tokenizer.encode_turn(messages, last_token=last_token)
        return self._tokenizer.encode("".join(m.content for m in messages), special=False)

    def _finish(self, job: SampleJob, draft: Draft, ending: Ending, reward: float) -> Sample:
        sample = draft.finish(
            index=job.index,
            outcome=ending.outcome,
            text=self._tokenizer.decode(draft.response),
            error=ending.error,
        )
        return replace(sample, reward=math.nan if ending.outcome.is_error else reward)


def _no_tokens() -> Int32Array:
    import numpy as np

    return np.empty(0, np.int32)


def _join(a: Int32Array, b: Int32Array) -> Int32Array:
    import numpy as np

    return np.concatenate([a, b])
