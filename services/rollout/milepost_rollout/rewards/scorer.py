"""Scores the samples of a prompt by the reward's name, wherever that reward runs."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from milepost.client.reward import RewardClient
from milepost.errors import MilepostError
from milepost.types import Outcome, Prompt, Sample, Scores
from milepost_common.metrics import Counter, Histogram
from milepost_rollout.metrics import REWARD_ERRORS, REWARD_SECONDS
from milepost_rollout.rewards.contract import RewardSample, Score
from milepost_rollout.rewards.names import Kind, RewardName, read_name
from milepost_rollout.rewards.pool import WorkerPool


class RewardService(Protocol):
    """What is asked of a remote reward."""

    async def score(self, prompt: Prompt, *, samples: Sequence[Sample], timeout_s: float | None) -> Scores:
        """One reward a sample."""
        ...

    async def close(self) -> None:
        """Ends the connection."""
        ...


class Scorer:
    """Owns the workers and the connections to remote rewards.

    Args:
      pool: the workers.
      timeout_s: longest wait for a remote reward.
      connect: opens a remote reward by `host:port`.

    Attributes:
      seconds, errors: time to score a group, and samples without a score, by where.
    """

    def __init__(
        self, pool: WorkerPool, *, timeout_s: float, connect: Callable[[str], RewardService] = RewardClient
    ) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._connect = connect
        self._remote: dict[str, RewardService] = {}
        self.seconds, self.errors = Histogram(REWARD_SECONDS), Counter(REWARD_ERRORS)

    async def check(self, name: str) -> None:
        """Makes sure that a reward can be used, before anything depends on it.

        Raises:
          InvalidArgument: it cannot; names the reward and the remedy.
        """
        if read_name(name).kind is Kind.WORKER:
            await self._pool.check(name)

    async def score(
        self, name: str, prompt: Prompt, *, prompt_text: Callable[[], str], samples: Sequence[Sample]
    ) -> list[Score]:
        """Scores samples in order; whatever goes wrong is in the scores.

        Args:
          name: the reward; empty scores nothing (NaN).
          prompt: the prompt as it was put.
          prompt_text: makes the text that the model saw; called only where a reward wants it.
          samples: the samples, with their texts.

        Raises:
          InvalidArgument: the name is not one of a reward.
        """
        reward = read_name(name)
        if reward.kind is Kind.NONE or not samples:
            return [Score()] * len(samples)
        where, started = reward.kind.value, time.perf_counter()
        scores = await self._score(reward, prompt, prompt_text, samples)
        self.seconds.record(time.perf_counter() - started, where)
        self.errors.add(where, amount=sum(bool(score.error) for score in scores))
        return scores

    async def _score(
        self, reward: RewardName, prompt: Prompt, prompt_text: Callable[[], str], samples: Sequence[Sample]
    ) -> list[Score]:
        if reward.kind is Kind.INLINE:
            label = prompt.label.strip()
            return [Score(reward=float(s.text.strip() == label)) for s in samples]
        if reward.kind is Kind.REMOTE:
            return await self._ask(reward, prompt, samples)
        return await self._pool.score(reward.name, _reward_samples(prompt, prompt_text(), samples))

    async def close(self) -> None:
        """Kills the workers and closes the connections."""
        await self._pool.close()
        await asyncio.gather(*(c.close() for c in self._remote.values()))

    async def _ask(self, reward: RewardName, prompt: Prompt, samples: Sequence[Sample]) -> list[Score]:
        client = self._remote.get(reward.address)
        if client is None:
            client = self._remote[reward.address] = self._connect(reward.address)
        try:
            async with asyncio.timeout(self._timeout_s):
                scores = await client.score(prompt, samples=samples, timeout_s=self._timeout_s)
            return _remote_scores(scores, len(samples), reward, prompt.prompt_id)
        except TimeoutError:
            what = f"no answer within {self._timeout_s:g} s (rollout.reward_timeout_s)"
        except MilepostError as error:
            what = f"{type(error).__name__}: {error}"
        return [Score(error=f"reward {reward.name!r}, prompt {prompt.prompt_id!r}: {what}")] * len(samples)


def _remote_scores(scores: Scores, wanted: int, reward: RewardName, prompt_id: str) -> list[Score]:
    start = f"reward {reward.name!r}, prompt {prompt_id!r}: "
    if len(scores.rewards) != wanted or len(scores.parts) not in (0, wanted):
        what = f"answered {len(scores.rewards)} rewards and {len(scores.parts)} parts for {wanted} samples"
        return [Score(error=f"{start}{what}; answer one of each a sample, or no parts")] * wanted
    parts: list[Mapping[str, float]] = [p.parts for p in scores.parts] or [{}] * wanted
    return [
        Score(reward=r, parts=p)
        if math.isfinite(r)
        else Score(error=f"{start}rewards[{i}] is {r}; answer finite numbers")
        for i, (r, p) in enumerate(zip(scores.rewards, parts, strict=True))
    ]


def _reward_samples(prompt: Prompt, text: str, samples: Sequence[Sample]) -> list[RewardSample]:
    metadata: Mapping[str, Any] = json.loads(prompt.metadata_json) if prompt.metadata_json else {}
    messages = tuple({"role": m.role, "content": m.content} for m in prompt.messages or ())
    return [
        RewardSample(
            prompt_id=prompt.prompt_id,
            index=s.index,
            prompt=text,
            messages=messages,
            response=s.text,
            label=prompt.label,
            metadata=metadata,
            prompt_tokens=tuple(s.tokens[: s.prompt_length].tolist()),
            response_tokens=tuple(s.tokens[s.prompt_length :].tolist()),
            outcome="truncated" if s.outcome is Outcome.TRUNCATED else "completed",
        )
        for s in samples
    ]
