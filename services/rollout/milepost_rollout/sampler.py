"""Makes one sample: asks engines and joins what they wrote, until the model or a limit ends it.

    slot --> /generate --> tokens --+--> ended: stop or length                  COMPLETED, TRUNCATED
     ^                              +--> cut short: keep the tokens, go on      (pinned to a version: ABORTED)
     |                              `--> failed or rubbish: again, `attempts`   ENGINE_ERROR
     `---- wait (back-off) <--- nobody there: as long as the deadline allows    EnginesUnavailable

A sample holds a slot only while its request is at an engine. "Nobody there" is no failure of the sample: it
waits, and when its time is over it raises, so that its prompt can be given back without being blamed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from milepost.errors import InvalidArgument
from milepost.types import Int32Array, Outcome, SamplingParams
from milepost_rollout.backoff import Backoff, BackoffPolicy
from milepost_rollout.capacity import Priority, SampleSlots
from milepost_rollout.draft import Draft
from milepost_rollout.engine_client import (
    EngineAway,
    EngineClient,
    EngineFailed,
    EngineRefused,
    GenerateRequest,
)
from milepost_rollout.replies import Generation
from milepost_rollout.sampling import to_engine
from milepost_rollout.status import Counters

ENGINE_BACKOFF = BackoffPolicy()


class EnginesUnavailable(Exception):
    """No engine could be asked until the sample's time was over."""


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How much is tried for a sample.

    Attributes:
      timeout_s: time for a sample from its first slot on, waits included.
      attempts: requests that may fail, or be answered with rubbish, for one turn of a sample.
      keep_partial: go on from the tokens of a reply that was cut short, instead of starting over.
      pinned_wait_s: how long a sample pinned to a version waits for an engine that serves it.
    """

    timeout_s: float = 600.0
    attempts: int = 3
    keep_partial: bool = True
    pinned_wait_s: float = 0.5
    backoff: BackoffPolicy = ENGINE_BACKOFF


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleJob:
    """One sample to make; `sampling` has every field set."""

    prompt_id: str
    index: int
    sampling: SamplingParams
    run_id: str = ""
    min_version: int = 0
    version: int = 0
    session: str = ""
    priority: Priority = Priority.TRAINING


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a turn of the model ended."""

    outcome: Outcome
    matched: str | int | None = None
    error: str = ""


class Sampler:
    """Makes turns of samples; shared by all of them.

    Args:
      client: where engines are asked.
      slots: who may ask.
      settings: how much is tried.
      counters: told whether engines answer.
      context_length: tokens that every engine takes, prompt and output together; 0 while unknown.
      instance_id: first part of request ids.
    """

    def __init__(
        self,
        client: EngineClient,
        *,
        slots: SampleSlots,
        settings: SamplerSettings,
        counters: Counters,
        context_length: Callable[[], int] = lambda: 0,
        instance_id: str = "gateway",
    ) -> None:
        self._client = client
        self.slots = slots
        self.settings = settings
        self.counters = counters
        self.context_length = context_length
        self._rids = map(f"{instance_id}-{{}}".format, itertools.count())

    def check_prompt(self, prompt_ids: Int32Array) -> None:
        """Raises InvalidArgument, naming both lengths, for a prompt that no engine can take."""
        context = self.context_length()
        if not len(prompt_ids):
            raise InvalidArgument("prompt: it has no tokens; give it at least one", reason="EMPTY_PROMPT")
        if context and len(prompt_ids) >= context:
            raise _too_long(len(prompt_ids), context)

    async def turn(self, job: SampleJob, draft: Draft) -> Ending:
        """Lets the model write into `draft` until its turn ends; see the module.

        Raises:
          InvalidArgument: the prompt does not fit the context.
          EnginesUnavailable: nobody could be asked.
        """
        return await _Turn(self, job, draft).run()

    async def ask(self, job: SampleJob, draft: Draft, *, room: int, timeout_s: float) -> Generation:
        """Sends one request; see `EngineClient.generate` for how that ends."""
        request = GenerateRequest(
            input_ids=draft.tokens,
            sampling=to_engine(job.sampling, max_new_tokens=room, index=job.index),
            rid=next(self._rids),
            run_id=job.run_id,
            min_version=job.min_version,
            version=job.version,
            session=job.session,
        )
        generation = await self._client.generate(request, timeout_s=timeout_s)
        self.counters.engines = ""
        return generation


class _Turn:
    """One turn of the model in one sample, over as many requests as it takes."""

    def __init__(self, sampler: Sampler, job: SampleJob, draft: Draft) -> None:
        self._sampler, self._job, self._draft = sampler, job, draft
        self._settings = sampler.settings
        self._backoff = Backoff(self._settings.backoff)
        self._start = draft.generated
        self._clock = asyncio.get_running_loop().time
        self._deadline = float("inf")
        self._failed = 0
        self._away_since: float | None = None
        self._last_error = "no request was sent"
        self._first = draft.mark()

    async def run(self) -> Ending:
        ending = None
        while ending is None:
            ending = await self._step()
        return ending

    async def _step(self) -> Ending | None:
        """Sends one request and judges how it ended; None: go on."""
        room = self._room()
        if room <= 0:
            return Ending(outcome=Outcome.TRUNCATED)
        try:
            generation = await self._request(room)
        except EngineAway as error:
            self._count("away")
            return await self._wait_for_engines(error)
        except EngineRefused as error:
            self._count("refused")
            return self._refused(error)
        except EngineFailed as error:
            self._count("failed")
            return await self._try_again(error)
        except TimeoutError:
            self._count("timeout")
            return self._out_of_time()
        self._count("answered" if generation.finish in ("stop", "length") else "cut_short")
        return await self._take(generation)

    def _count(self, result: str) -> None:
        self._sampler.counters.asks.add(result)

    def _room(self) -> int:
        written = self._draft.generated - self._start
        room = (self._job.sampling.max_new_tokens or 0) - written
        context = self._sampler.context_length()
        return min(room, context - self._draft.length) if context else room

    async def _request(self, room: int) -> Generation:
        async with self._sampler.slots.hold(self._job.priority):
            self._deadline = min(self._deadline, self._clock() + self._settings.timeout_s)
            remaining_s = self._deadline - self._clock()
            if remaining_s <= 0:
                raise TimeoutError
            return await self._sampler.ask(self._job, self._draft, room=room, timeout_s=remaining_s)

    async def _take(self, generation: Generation) -> Ending | None:
        self._away_since = None
        pinned = self._job.version
        self._draft.add_model(generation)
        if pinned and self._draft.versions - {pinned}:
            return self._aborted("the engine went on with other weights")
        if generation.finish == "stop":
            return Ending(outcome=Outcome.COMPLETED, matched=generation.matched)
        if generation.finish == "length":
            return Ending(outcome=Outcome.TRUNCATED)
        if pinned:
            return self._aborted(generation.message or "the engine ended the request")
        if not self._settings.keep_partial:
            self._draft.rewind(self._first)
        if len(generation.output_ids):
            self._backoff.reset()
        else:
            self._last_error = f"cut short: {generation.message}"
            await self._sleep(self._backoff.next_s())
        return None

    async def _wait_for_engines(self, error: EngineAway) -> Ending | None:
        self._last_error = str(error)
        self._sampler.counters.engines = f"engines: {error}"
        now = self._clock()
        self._away_since = now if self._away_since is None else self._away_since
        if self._job.version and error.answered and now - self._away_since >= self._settings.pinned_wait_s:
            return self._aborted(str(error))
        if now >= self._deadline:
            raise EnginesUnavailable(self._late())
        await self._sleep(self._backoff.next_s(asked_s=error.retry_after_s))
        return None

    async def _try_again(self, error: EngineFailed) -> Ending | None:
        self._last_error = str(error)
        self._away_since = None
        self._failed += 1
        if self._failed >= self._settings.attempts:
            what = f"{error} ({self._failed} requests failed; rollout.engine_attempts)"
            return Ending(outcome=Outcome.ENGINE_ERROR, error=self._named(what))
        await self._sleep(self._backoff.next_s())
        return None

    def _refused(self, error: EngineRefused) -> Ending:
        text = str(error).lower()
        if "context" in text or "longer than" in text or "too long" in text:
            context = self._sampler.context_length()
            raise _too_long(self._draft.length, context, said=str(error))
        return Ending(outcome=Outcome.ENGINE_ERROR, error=self._named(f"the engine refused: {error}"))

    def _out_of_time(self) -> Ending:
        if self._away_since is not None:
            raise EnginesUnavailable(self._late())
        return Ending(outcome=Outcome.ENGINE_ERROR, error=self._named(self._late()))

    def _aborted(self, why: str) -> Ending:
        return Ending(
            outcome=Outcome.ABORTED, error=self._named(f"pinned to weight version {self._job.version}: {why}")
        )

    def _late(self) -> str:
        return (
            f"not done within {self._settings.timeout_s:g} s (rollout.sample_timeout_s); {self._last_error}"
        )

    def _named(self, what: str) -> str:
        return f"prompt {self._job.prompt_id!r}, sample {self._job.index}: {what}"

    async def _sleep(self, wait_s: float) -> None:
        await asyncio.sleep(max(0.0, min(wait_s, self._deadline - self._clock())))


def _too_long(length: int, context: int, said: str = "") -> InvalidArgument:
    of = f"the engines' context of {context} tokens" if context else "the engines' context"
    return InvalidArgument(
        f"prompt: {length} tokens leave no room in {of}; shorten it, or use a model with a longer context"
        + (f" (engine: {said})" if said else ""),
        reason="PROMPT_TOO_LONG",
        metadata={"prompt_tokens": str(length), "context_length": str(context)},
    )
