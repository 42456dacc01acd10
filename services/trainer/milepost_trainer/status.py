"""What the trainer is doing, and what others asked of it: shared by the step loop and its servicer.

The loop writes, the servicer reads; requests (pause, save) go the other way as flags that the loop looks at
between steps. One event loop, so no locks: whoever waits uses ``woken`` (the loop) or ``wait_for_news``
(watchers).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from milepost.types import SavedCheckpoint, StepMetrics, TrainerStatus
from milepost_common.metrics import Instrument, Phases, Watched
from milepost_trainer.meters import CHECKPOINT, COMMITTED, PHASE_SECONDS

_KEPT_STEPS = 1000


@dataclass
class TrainerState:
    """State of one trainer.

    Attributes:
        run_id: its run.
        world_size: its ranks.
        term: its term; 0 before it has one.
        phase: "starting", "waiting", "training", "publishing", "saving", "paused" or "finished".
        waiting_for: in words.
        step: newest committed step.
        published_step: newest label it published.
        weight_version: the version of that.
        checkpoint: the newest checkpoint.
        paused: no step shall start.
        save_wanted: a checkpoint shall be saved at the next chance.
        woken: set when one of the flags changed.
    """

    run_id: str
    world_size: int = 1
    term: int = 0
    phase: str = "starting"
    waiting_for: str = ""
    step: int = 0
    published_step: int = 0
    weight_version: int = 0
    checkpoint: SavedCheckpoint = field(default_factory=SavedCheckpoint)
    paused: bool = False
    save_wanted: bool = False
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    steps: deque[StepMetrics] = field(default_factory=lambda: deque[StepMetrics](maxlen=_KEPT_STEPS))
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _started: float = field(default_factory=time.monotonic)
    _times: Phases = field(default_factory=lambda: Phases(PHASE_SECONDS, first="starting"))

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """What it tells as metrics."""
        return (
            self._times,
            Watched(COMMITTED, lambda: [((), self.step)]),
            Watched(CHECKPOINT, lambda: [((), self.checkpoint.step)]),
        )

    def enter(self, phase: str, waiting_for: str = "") -> None:
        """Note what the loop does now."""
        self._times.enter(phase)
        self.phase, self.waiting_for = phase, waiting_for
        self.announce()

    def add_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep a step's metrics and tell watchers."""
        self.steps.append(StepMetrics(step=step, metrics=dict(metrics)))
        self.announce()

    def announce(self) -> None:
        """Tell watchers that something changed."""
        self._news.set()
        self._news = asyncio.Event()

    async def wait_for_news(self, *, timeout_s: float) -> None:
        """Wait for the next change, at most so long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            pass

    def ask_pause(self, paused: bool) -> None:
        """Stop before the next step, or go on."""
        self.paused = paused
        self.woken.set()

    def ask_save(self) -> None:
        """Save a checkpoint at the next chance."""
        self.save_wanted = True
        self.woken.set()

    def snapshot(self) -> TrainerStatus:
        """The status as others see it."""
        return TrainerStatus(
            run_id=self.run_id,
            term=self.term,
            phase=self.phase,
            waiting_for=self.waiting_for,
            step=self.step,
            published_step=self.published_step,
            weight_version=self.weight_version,
            checkpoint_step=self.checkpoint.step,
            world_size=self.world_size,
            uptime_s=time.monotonic() - self._started,
        )
