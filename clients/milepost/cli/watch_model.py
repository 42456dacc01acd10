"""What `milepost watch` knows: one snapshot, kept by one poller a service. No terminal here.

    buffer   GetStats   --every interval--> |
    router   ListEngines -----------------> | Snapshot --> view
    gateway  GetStatus   -----------------> |
    trainer  WatchSteps (stream), GetTrainerStatus

Each poller owns its client and its part of the snapshot. A service that is away leaves its last answer
standing, with the reason; the others do not notice.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from milepost.channel import NO_RETRY
from milepost.cli.options import in_words
from milepost.client import BufferClient, RolloutClient, RouterClient, TrainerClient
from milepost.errors import MilepostError
from milepost.types import Engine, RolloutStatus, RunStats, StepMetrics, TrainerStatus

T = TypeVar("T")

TIMEOUT_S = 2.0
MAX_STEPS = 200
_STEPS_QUIET_S = 0.3


@dataclass
class Answer(Generic[T]):
    """The last answer of a service, and why there is no newer one."""

    value: T | None = None
    away: str = "not asked yet"
    at_s: float = 0.0

    def set(self, value: T) -> None:
        """It answered."""
        self.value, self.away, self.at_s = value, "", time.monotonic()

    def fail(self, error: MilepostError, *, where: str) -> None:
        """It did not."""
        self.away = in_words(error, where=where).split("; is it")[0]


@dataclass
class Snapshot:
    """Everything that is shown."""

    run_id: str
    stats: Answer[RunStats] = field(default_factory=Answer[RunStats])
    engines: Answer[tuple[Engine, ...]] = field(default_factory=Answer[tuple[Engine, ...]])
    gateway: Answer[RolloutStatus] = field(default_factory=Answer[RolloutStatus])
    trainer: Answer[TrainerStatus] = field(default_factory=Answer[TrainerStatus])
    steps: deque[StepMetrics] = field(default_factory=lambda: deque[StepMetrics](maxlen=MAX_STEPS))
    generated: deque[tuple[float, int]] = field(default_factory=lambda: deque[tuple[float, int]](maxlen=16))

    def add_step(self, step: StepMetrics) -> None:
        """A step's metrics; a step that was trained again takes the place of what followed it."""
        while self.steps and self.steps[-1].step >= step.step:
            self.steps.pop()
        self.steps.append(step)

    @property
    def anybody_answered(self) -> bool:
        """False when nobody is there at all."""
        return any(a.value is not None for a in (self.stats, self.engines, self.gateway, self.trainer))

    def series(self, name: str) -> list[float]:
        """A metric over the steps that have it."""
        return [s.metrics[name] for s in self.steps if name in s.metrics]

    def latest(self, name: str) -> float | None:
        """A metric of the newest step."""
        return self.steps[-1].metrics.get(name) if self.steps else None

    @property
    def generated_per_s(self) -> float | None:
        """Tokens that the gateway generated per second, lately; None while unknown, or after its restart."""
        if len(self.generated) < 2:
            return None
        (t0, n0), (t1, n1) = self.generated[0], self.generated[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 and n1 >= n0 else None


class Watcher:
    """Fills a snapshot.

    Args:
      run_id: the run.
      addresses: `host:port` of buffer, router, rollout and trainer.
      interval_s: time between two questions to one service.
    """

    def __init__(self, run_id: str, *, addresses: Mapping[str, str], interval_s: float = 1.0) -> None:
        self.snapshot = Snapshot(run_id=run_id)
        self._addresses, self._interval_s = addresses, interval_s

    async def run(self) -> None:
        """Asks until it is cancelled."""
        async with self._clients() as clients, asyncio.TaskGroup() as group:
            for ask in clients.questions:
                group.create_task(self._again_and_again(ask))
            group.create_task(self._again_and_again(clients.follow_steps))

    async def once(self) -> None:
        """Asks every service once, all at the same time."""
        async with self._clients() as clients, asyncio.TaskGroup() as group:
            for ask in clients.questions:
                group.create_task(ask())
            group.create_task(clients.read_steps())

    async def _again_and_again(self, ask: Callable[[], Awaitable[None]]) -> None:
        while True:
            await ask()
            await asyncio.sleep(self._interval_s)

    def _clients(self) -> _Clients:
        return _Clients(self.snapshot, self._addresses)


class _Clients(AsyncExitStack):
    """One client a service, and the questions they ask."""

    def __init__(self, snapshot: Snapshot, addresses: Mapping[str, str]) -> None:
        super().__init__()
        self._snapshot = snapshot
        self._buffer = BufferClient(addresses["buffer"], retry=NO_RETRY, timeout_s=TIMEOUT_S)
        self._router = RouterClient(addresses["router"], retry=NO_RETRY, timeout_s=TIMEOUT_S)
        self._rollout = RolloutClient(addresses["rollout"], retry=NO_RETRY, timeout_s=TIMEOUT_S)
        self._trainer = TrainerClient(addresses["trainer"], retry=NO_RETRY, timeout_s=TIMEOUT_S)
        for client in (self._buffer, self._router, self._rollout, self._trainer):
            self.push_async_exit(client)
        self.questions = (self.ask_buffer, self.ask_router, self.ask_gateway, self.ask_trainer)

    async def ask_buffer(self) -> None:
        """Counts of the ledger."""
        try:
            stats = await self._buffer.get_stats(self._snapshot.run_id)
        except MilepostError as error:
            self._snapshot.stats.fail(error, where=self._buffer.address)
            return
        if stats:
            self._snapshot.stats.set(stats[0])

    async def ask_router(self) -> None:
        """The fleet."""
        try:
            self._snapshot.engines.set((await self._router.list_engines(self._snapshot.run_id)).engines)
        except MilepostError as error:
            self._snapshot.engines.fail(error, where=self._router.address)

    async def ask_gateway(self) -> None:
        """The gateway, and how fast it generates."""
        try:
            status = await self._rollout.get_status()
        except MilepostError as error:
            self._snapshot.gateway.fail(error, where=self._rollout.address)
            return
        self._snapshot.gateway.set(status)
        generated = self._snapshot.generated
        if generated and status.tokens_generated < generated[-1][1]:
            generated.clear()
        generated.append((time.monotonic(), status.tokens_generated))

    async def ask_trainer(self) -> None:
        """What the trainer does."""
        try:
            self._snapshot.trainer.set(await self._trainer.get_trainer_status())
        except MilepostError as error:
            self._snapshot.trainer.fail(error, where=self._trainer.address)

    async def follow_steps(self) -> None:
        """Takes steps as they come, until the stream breaks."""
        steps = self._snapshot.steps
        try:
            async for step in self._trainer.watch_steps(after_step=steps[-1].step if steps else 0):
                self._snapshot.add_step(step)
        except MilepostError as error:
            self._snapshot.trainer.fail(error, where=self._trainer.address)

    async def read_steps(self) -> None:
        """Takes the steps that the trainer remembers."""
        stream = self._trainer.watch_steps()
        try:
            async with asyncio.timeout(TIMEOUT_S) as limit:
                async for step in stream:
                    self._snapshot.add_step(step)
                    limit.reschedule(asyncio.get_running_loop().time() + _STEPS_QUIET_S)
        except TimeoutError:
            pass
        except MilepostError as error:
            self._snapshot.trainer.fail(error, where=self._trainer.address)
