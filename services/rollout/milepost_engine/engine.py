"""The engine without HTTP: model, tokenizer, scheduler, weights and groups, wired together.

Built by `build` on the main thread before anything serves; afterwards the scheduler thread owns the model,
and this object is used from the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import torch

from milepost_engine.dialect import DIALECTS, Dialect
from milepost_engine.errors import Unavailable
from milepost_engine.generation import Generation, LogprobOptions
from milepost_engine.groups import GroupRegistry
from milepost_engine.params import SamplingParams
from milepost_engine.requests import Limits, PromptWork, generations, new_rid
from milepost_engine.runner import ModelRunner, load_model
from milepost_engine.scheduler import Scheduler
from milepost_engine.settings import EngineSettings
from milepost_engine.text import Text
from milepost_engine.updates import WeightUpdater
from milepost_engine.weights import DTYPES, WeightStore

logger = logging.getLogger(__name__)


class Waiter:
    """Waits, on the event loop, for the generations of one call."""

    def __init__(self) -> None:
        self._unfinished = 0
        self._changed: dict[int, Generation] = {}
        self._event = asyncio.Event()
        self.generations: list[Generation] = []

    def expect(self, generations: list[Generation]) -> None:
        """Adds generations to wait for."""
        self.generations.extend(generations)
        self._unfinished += len(generations)

    def on_progress(self, generation: Generation) -> None:
        """A Listener's one method."""
        finished = generation.finish is not None
        if finished:
            self._unfinished -= 1
        if finished or generation.stream:
            self._changed[id(generation)] = generation
            if generation.stream or not self._unfinished:
                self._event.set()

    async def finished(self) -> None:
        """Returns once every generation is finished."""
        while self._unfinished > 0:
            self._event.clear()
            await self._event.wait()

    async def changes(self) -> AsyncIterator[Generation]:
        """Yields generations as they advance, each for the last time when it is finished."""
        while self._unfinished > 0 or self._changed:
            if not self._changed:
                self._event.clear()
                await self._event.wait()
            batch, self._changed = list(self._changed.values()), {}
            for generation in batch:
                yield generation


class Engine:
    """Everything behind the HTTP surface.

    Args:
        settings: Of this engine.
        runner: The loaded model.
        text: The tokenizer, if any.
        limits: What the model can take.
        on_death: Called on the event loop when the scheduler thread has died; the process must end.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        runner: ModelRunner,
        text: Text,
        limits: Limits,
        on_death: Callable[[BaseException], None],
    ) -> None:
        self.settings = settings
        self.text = text
        self.limits = limits
        self.model = runner.model
        self.dialect: Dialect = DIALECTS[settings.dialect]
        self.started_s = time.time()
        self._on_death = on_death
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reported = 0
        self.weights = WeightStore(runner.model)
        self.groups = GroupRegistry(timeout_s=settings.group_timeout_s)
        self.scheduler = Scheduler(
            runner,
            max_running=settings.max_running_requests,
            max_prefill_tokens=settings.max_prefill_tokens,
            seed=settings.sampling_seed,
            weight_version=settings.weight_version,
            notify=self._notify,
            on_death=self._report_death,
        )
        self.updater = WeightUpdater(
            self.scheduler,
            self.weights,
            self.groups,
            dialect=self.dialect,
            timeout_s=settings.transfer_timeout_s,
        )

    def start(self) -> None:
        """Starts the scheduler; call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        self.scheduler.start()

    async def stop(self) -> None:
        """Aborts everything live, leaves every group, ends the scheduler, within the shutdown deadline."""
        self.groups.close()
        stopped = await asyncio.to_thread(self.scheduler.stop, timeout_s=self.settings.shutdown_timeout_s)
        if not stopped:
            logger.error("the scheduler is still in a forward pass after the deadline")

    def _notify(self, advanced: list[Generation]) -> None:
        self._on_loop(_dispatch, advanced)

    def _report_death(self, error: BaseException) -> None:
        self._on_loop(self._on_death, error)

    def _on_loop(self, function: Callable[..., None], argument: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, argument)

    # ---- generation ------------------------------------------------------------------------------------

    def check_serving(self) -> None:
        """Refuses work that would wait for a memory call that may never come.

        Raises:
            Unavailable: The scheduler died, or weights or KV memory are released.
        """
        if not self.scheduler.alive:
            raise Unavailable("the engine's scheduler has stopped: send the request to another engine")
        if self.scheduler.holds:
            tags = ", ".join(sorted(self.scheduler.holds))
            raise Unavailable(
                f"memory is released ({tags}): call /resume_memory_occupation"
                + (" and update the weights" if "weights" in self.scheduler.holds else "")
            )

    def submit(self, works: list[PromptWork], *, stream: bool) -> Waiter:
        """Queues prompts; the waiter's `generations` are in order of prompt, then sample.

        Raises:
            Unavailable: As `check_serving`.
        """
        self.check_serving()
        waiter = Waiter()
        for work in works:
            waiter.expect(
                generations(work, limits=self.limits, text=self.text, stream=stream, listener=waiter)
            )
        for generation in waiter.generations:
            if generation.params.sampling_seed is not None:
                generation.generator = torch.Generator().manual_seed(generation.params.sampling_seed)
        self.scheduler.submit(waiter.generations)
        return waiter

    def abandon(self, waiter: Waiter, *, reason: str) -> None:
        """Aborts what is left of a call whose caller has gone."""
        left = [generation for generation in waiter.generations if generation.finish is None]
        if left:
            self.scheduler.call(lambda: self.scheduler.abort_these(left, message=reason))

    async def probe(self) -> bool:
        """Generates one token, or, where nothing may run (paused, released), has the scheduler answer."""
        if self.scheduler.paused or self.scheduler.holds:
            return await self._in_time(asyncio.wrap_future(self.scheduler.call(lambda: True)))
        token = min(self.limits.eos_ids, default=0)
        params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        work = PromptWork(
            rid=f"HEALTH_CHECK_{new_rid()}",
            prompt_ids=[token],
            params=params,
            logprobs=LogprobOptions(),
            max_new_tokens=1,
        )
        waiter = self.submit([work], stream=False)
        answered = await self._in_time(waiter.finished())
        self.abandon(waiter, reason="the health check was given up")
        return answered and bool(waiter.generations[0].output_ids)

    async def _in_time(self, waiting: Awaitable[Any]) -> bool:
        try:
            await asyncio.wait_for(waiting, self.settings.health_timeout_s)
        except TimeoutError:
            return False
        return True


def _dispatch(advanced: list[Generation]) -> None:
    for generation in advanced:
        generation.listener.on_progress(generation)


def build(settings: EngineSettings, *, on_death: Callable[[BaseException], None]) -> Engine:
    """Loads model and tokenizer and checks that the model can be served.

    Raises:
        UnsupportedModel: It cannot.
    """
    torch.set_num_threads(settings.num_threads)
    model = load_model(
        settings.model, dtype=DTYPES[settings.dtype], load_format=settings.load_format, seed=settings.seed
    )
    runner = ModelRunner(model, max_slots=settings.max_running_requests)
    runner.self_check()
    text = Text(None) if settings.skip_tokenizer_init else Text.load(settings.model)
    limits = Limits(
        context_length=settings.context_length or runner.model_context,
        vocab_size=runner.vocab_size,
        eos_ids=_eos_ids(model, text),
    )
    return Engine(settings, runner=runner, text=text, limits=limits, on_death=on_death)


def _eos_ids(model: Any, text: Text) -> frozenset[int]:
    """End-of-sequence tokens of the generation config, the model config and the tokenizer together."""
    found: set[int] = set()
    generation_config = getattr(model, "generation_config", None)
    for value in (
        getattr(generation_config, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        text.eos_token_id,
    ):
        found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)
