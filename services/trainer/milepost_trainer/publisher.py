"""The publisher: the trainer's side of the weight transaction, level-triggered.

    engines of the run --WatchFleet--> wanted? --catch_up()--> prepare, buckets, commit --> engines serve

Wanted is a state, not an event: the label that is due is not published yet, or an engine of the run does not
serve the newest label. Whoever holds the weights still (the step loop, between micro-batches, while it waits)
calls ``catch_up``; it makes a transaction, and one more for engines that were left out of it, and never
raises for a fleet that fails, only backs off.

    due > published          new version with the label of the current weights
    engines lag behind       the published version again, for them, if the current weights are still its; else
                             a new version
    label < floor            silence: a replay below what was published before the crash, as long as an engine
                             serves that; once none has for a while, they get the weights of the replay

Owns: attempt numbers, what is published, when to try again. The router owns the fleet, the ledger owns the
numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from milepost import types as t
from milepost.client.router import RouterClient
from milepost.errors import FailedPrecondition, MilepostError, NotFound, StaleTerm
from milepost_common.metrics import Counter, Instrument, Phases
from milepost_trainer.buckets import Bucket
from milepost_trainer.engine_memory import EngineMemory
from milepost_trainer.meters import (
    FAILED,
    IDLE,
    NOBODY,
    PUBLICATIONS,
    PUBLISHED,
    PUBLISHED_BYTES,
    PUBLISHER_SECONDS,
    PUBLISHING,
    WAITING,
)
from milepost_trainer.settings import PublishSettings
from milepost_trainer.transfer import Gather, Transfer, Whole
from milepost_trainer.transports.base import WeightTransport

log = logging.getLogger(__name__)

T = TypeVar("T")
_PAUSE = {"retract": t.PauseMode.RETRACT, "in_place": t.PauseMode.IN_PLACE, "abort": t.PauseMode.ABORT}
_LOOK_AGAIN_S = 30.0
_ABORT_S = 10.0
"""A router that does not hear of the end in time finds out: by the stream, the deadline, the next prepare."""
_WATCH_AGAIN_S = 1.0
_AHEAD_S = 1.0
"""So long a router that does not answer may hold a step up; it is asked again once the weights are there."""
_UNSERVED_S = 5.0
"""For so long no engine must serve before weights below the floor are published: time for all to show up at a
router that was started again."""
_MAY_SERVE = (t.EngineState.SERVING, t.EngineState.UPDATING, t.EngineState.JOINING, t.EngineState.DRAINING)


@dataclass(frozen=True)
class Published:
    """What engines serve.

    Attributes:
        version: its number; 0 before the first publication.
        label: the step whose weights it is; None before the first publication.
    """

    version: int = 0
    label: int | None = None


class Publisher:
    """Publishes the current weights to whoever lacks them.

    Args:
        router: control of the fleet.
        transport: moves the bytes.
        buckets: of the model, planned for this transport.
        gather: brings a bucket's bytes to this rank.
        whole: brings all weights to this rank, for transports whose members copy them from there.
        settings: deadlines, pause mode.
        run_id: the run.
    """

    def __init__(
        self,
        router: RouterClient,
        *,
        transport: WeightTransport,
        buckets: Sequence[Bucket],
        gather: Gather,
        settings: PublishSettings,
        run_id: str,
        whole: Whole | None = None,
    ) -> None:
        self._router = router
        self._transport = transport
        self._transfer = Transfer(
            router, transport, buckets=buckets, gather=gather, whole=whole, timeout_s=settings.timeout_s
        )
        self._settings = settings
        self._memory = EngineMemory(router, settings, run_id=run_id)
        self._run_id = run_id
        self._fleet = t.Fleet()
        self._attempts: dict[int, int] = {}
        self._failures = 0
        self._not_before = 0.0
        self._own = False  # this process published what is published
        self._ahead: tuple[int, int, t.Prepared] | None = None  # term and label it was prepared for
        self._due: int | None = None
        self._floor = 0
        self._unserved_since: float | None = None
        self.changed = asyncio.Event()
        self._outcomes, self._bytes = Counter(PUBLICATIONS), Counter(PUBLISHED_BYTES)
        for outcome in (PUBLISHED, FAILED, NOBODY):
            self._outcomes.cell(outcome)
        self._times = Phases(PUBLISHER_SECONDS, first=WAITING)
        self.term = 0
        self.label = 0
        self.published = Published()

    def start(self, *, term: int, label: int, published: Published) -> None:
        """Say where the run stands after the checkpoint is loaded.

        Args:
            term: of this trainer.
            label: step of the loaded weights.
            published: what the ledger holds as newest; nothing is published below its label.
        """
        self.term, self.label, self.published = term, label, published
        self._floor = published.label or 0
        self._due = label

    def moved_to(self, label: int, *, due: bool) -> None:
        """The weights are now those of step `label`; `due` says that engines shall get them."""
        self.label = label
        if due:
            self._due = label
            self._failures, self._not_before = 0, 0.0

    def forgotten(self, published: Published) -> None:
        """Redis is another one and holds this as newest: what it forgot is published again."""
        if published.version < self.published.version:
            self.published, self._own = published, False

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """What it tells as metrics."""
        return self._outcomes, self._bytes, self._times

    @property
    def wanted(self) -> bool:
        """Engines should be given weights, and it is time to try."""
        return self.lacking and time.monotonic() >= self._not_before

    @property
    def retry_in_s(self) -> float:
        """Seconds until a failed publication may be tried again, or silence may end."""
        now = time.monotonic()
        if self.lacking:
            return max(0.0, self._not_before - now)
        silent_s = 0.0 if self._unserved_since is None else self._unserved_since + _UNSERVED_S - now
        return silent_s if silent_s > 0 else _LOOK_AGAIN_S

    @property
    def _is_due(self) -> bool:
        newest = self.published.label
        return self._due is not None and (newest is None or newest < self._due)

    @property
    def lacking(self) -> bool:
        """Engines should be given weights, or their memory, be it time to try or not."""
        if self._memory.owed:
            return True
        return not self._silent and any(self._lags(engine) for engine in self._engines)

    @property
    def _engines(self) -> list[t.Engine]:
        return [e for e in self._fleet.engines if e.run_id in ("", self._run_id)]

    @property
    def _silent(self) -> bool:
        """Engines are left alone: they serve newer weights than those of the replay."""
        if self.label >= self._floor:
            return False
        return self._unserved_since is None or time.monotonic() < self._unserved_since + _UNSERVED_S

    def _saw(self, fleet: t.Fleet) -> None:
        self._fleet = fleet
        if not self._engines or any(e.state in _MAY_SERVE for e in self._engines):
            self._unserved_since = None
        elif self._unserved_since is None:
            self._unserved_since = time.monotonic()

    def _lags(self, engine: t.Engine) -> bool:
        if engine.state in (t.EngineState.STALE, t.EngineState.QUARANTINED):
            return True
        newest = self.published.label
        behind = self._is_due or (newest is not None and engine.weight_label < newest)
        return engine.state is t.EngineState.SERVING and behind

    # ------------------------------------------------------------------ watching

    async def watch(self) -> None:
        """Follow the fleet for ever; run as a task beside the loop."""
        while True:
            try:
                async for fleet in self._router.watch_fleet(self._run_id):
                    if fleet.fleet_epoch != self._fleet.fleet_epoch:
                        self._failures, self._not_before = 0, 0.0
                    self._saw(fleet)
                    self.changed.set()
            except MilepostError as error:
                log.debug("the router does not answer: %s", error)
            await asyncio.sleep(_WATCH_AGAIN_S)

    @asynccontextmanager
    async def borrowing(self) -> AsyncGenerator[None]:
        """Engines lend their memory for the block, where the settings say so.

        Raises:
            StaleTerm: another trainer took over.
        """
        async with self._memory.lent(self.term):
            yield
        await self._look()

    async def give_back(self) -> None:
        """Memory that an earlier trainer borrowed goes back.

        Raises:
            StaleTerm: another trainer took over.
        """
        await self._memory.give_back(self.term)

    async def serving(self) -> list[t.Engine]:
        """Engines that serve what is published, as the router has it now; none where it does not say."""
        try:
            fleet = await self._router.list_engines(self._run_id)
        except MilepostError as error:
            log.warning("the router does not say who serves version %d: %s", self.published.version, error)
            return []
        serves = (t.EngineState.SERVING, self.published.version)
        return [e for e in fleet.engines if (e.state, e.weight_version) == serves]

    async def _look(self) -> None:
        """See the fleet as it is now: engines that lent their memory need weights at once."""
        if self._settings.release_memory:
            with contextlib.suppress(MilepostError):
                self._saw(await self._router.list_engines(self._run_id))

    # ------------------------------------------------------------------ publishing

    async def catch_up(self) -> bool:
        """Publish if that is wanted; the weights must stand still meanwhile.

        Returns:
            True when engines were given weights.

        Raises:
            StaleTerm: another trainer took over.
        """
        self.changed.clear()
        committed = await self._catch_up()
        if committed is not None and self._left_out(committed):
            await self._catch_up()
        return committed is not None

    async def _catch_up(self) -> t.Committed | None:
        """One transaction, if it is wanted; None where it was not, or came to nothing."""
        if not self.wanted or not await self._settled():
            return None
        again = not self._is_due and self.label == self.published.label and self._own
        version = self.published.version if again else 0
        self._times.enter(PUBLISHING)
        attempt = self._attempts.get(self.label, 0) + 1
        self._attempts[self.label] = attempt
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                committed = await self._transact(version=version, attempt=attempt)
        except StaleTerm:
            raise
        except (MilepostError, TimeoutError) as error:
            if again and isinstance(error, FailedPrecondition | NotFound):
                self._own = False  # the ledger does not hold that version any more: a new one, then
            self._back_off(str(error) or f"deadline of {self._settings.timeout_s:.0f} s passed")
            return None
        if committed is None:  # the fleet as we see it is older than the router's
            self._not_before = time.monotonic() + self._settings.retry_delay_s
            self._outcomes.add(NOBODY)
            self._times.enter(WAITING)
            self._adopt()
            return None
        self._failures, self._not_before = 0, 0.0
        self.published, self._own = Published(committed.version, self.label), True
        self._floor = min(self._floor, self.label)
        self._outcomes.add(PUBLISHED)
        self._bytes.add(amount=self._transfer.size_bytes)
        self._times.enter(IDLE)
        for engine, why in committed.quarantined.items():
            log.warning("engine %s is quarantined: %s", engine, why)
        return committed

    async def _settled(self) -> bool:
        """Give engines the memory that they are owed; says whether weights are wanted then."""
        if not self._memory.owed:
            return True
        await self.give_back()
        if self._memory.owed:
            self._back_off("engines lend their memory still")
            return False
        await self._look()
        return self.wanted

    def _left_out(self, committed: t.Committed) -> bool:
        """Engines lacked weights and were no members: the router gives them a transaction apart, or none."""
        lacking = {
            e.engine_id
            for e in self._fleet.engines
            if e.state in (t.EngineState.STALE, t.EngineState.QUARANTINED) and e.run_id in ("", self._run_id)
        }
        return not lacking <= {*committed.serving, *committed.quarantined}

    def _adopt(self) -> None:
        """Take what engines serve for published: the answer to an earlier commit may have been lost."""
        serving = [
            e.weight_version
            for e in self._fleet.engines
            if e.state is t.EngineState.SERVING and e.run_id == self._run_id and e.weight_label == self.label
        ]
        if max(serving, default=0) > self.published.version:
            self.published, self._own = Published(max(serving), self.label), False

    def _back_off(self, why: str) -> None:
        self._outcomes.add(FAILED)
        self._times.enter(WAITING)
        self._failures += 1
        delay = self._settings.retry_delay_s * 2.0 ** min(self._failures - 1, 32)
        delay = min(delay, max(self._settings.max_retry_delay_s, self._settings.retry_delay_s))
        self._not_before = time.monotonic() + delay
        log.warning("weights of step %d not published, again in %.1f s: %s", self.label, delay, why)

    async def _transact(self, *, version: int, attempt: int) -> t.Committed | None:
        prepared = self._take_ahead() if not version else None
        if prepared is None:
            prepared = await self._prepare(self.label, version=version, attempt=attempt)
        if not prepared.members:
            return None
        done = False
        try:
            await self._transport.open(prepared, timeout_s=self._settings.timeout_s)
            num_buckets, committed = await self._transfer.run(prepared)
            committed = committed or await self._router.commit_weights(
                prepared.transaction_id,
                fleet_epoch=prepared.fleet_epoch,
                term=self.term,
                num_buckets=num_buckets,
                timeout_s=self._settings.timeout_s,
            )
            done = True
            return committed
        finally:
            await self._end(prepared, done=done)

    async def prepare_ahead(self, label: int) -> None:
        """Open the transaction of the weights that `label` will have, while that step still makes them.

        Members serve on; the bytes, and the pause, come with `catch_up`. Where it fails, or is not used, the
        next preparation takes its place.
        """
        if not self._transport.prepares_ahead or self._silent or label <= self._floor or self.lacking:
            return
        self._ahead = None
        attempt = self._attempts.get(label, 0) + 1
        self._attempts[label] = attempt
        try:
            async with asyncio.timeout(_AHEAD_S):
                prepared = await self._prepare(label, version=0, attempt=attempt)
        except StaleTerm:
            raise
        except (MilepostError, TimeoutError) as error:
            log.debug("weights of step %d not prepared ahead: %s", label, error)
            return
        if prepared.members:
            self._ahead = (self.term, label, prepared)
            await self._transfer.open_ahead(prepared)

    async def while_made(self, label: int, work: Awaitable[T]) -> T:
        """Await the last work on the weights of `label`, and prepare their transaction meanwhile.

        Raises:
            StaleTerm: another trainer took over.
        """
        ahead = asyncio.create_task(self.prepare_ahead(label), name=f"prepare step {label}")
        try:
            return await work
        finally:
            await ahead

    def _take_ahead(self) -> t.Prepared | None:
        """What was prepared for the weights that are due now."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[:2] != (self.term, self.label) or not self._is_due:
            return None
        return ahead[2]

    async def forget_ahead(self) -> None:
        """What was prepared will not be sent."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            await self._transfer.close_ahead()
            await self._abort(ahead[2])

    async def _prepare(self, label: int, *, version: int, attempt: int) -> t.Prepared:
        return await self._router.prepare_weights(
            t.PrepareRequest(
                run_id=self._run_id,
                term=self.term,
                label=label,
                attempt=attempt,
                version=version,
                manifest=self._transfer.manifest,
                transport=self._transport.kind,
                pause_mode=_PAUSE[self._settings.pause_mode],
                master_address=self._transport.master_address,
                master_port=self._transport.master_port,
                group_name=self._transport.group_name,
                nccl_version=self._transport.nccl_version,
                timeout_s=self._settings.timeout_s,
            )
        )

    async def _end(self, prepared: t.Prepared, *, done: bool) -> None:
        await self._transfer.close_ahead()
        await self._transport.close(broken=not done)
        if not done:
            await self._abort(prepared)

    async def _abort(self, prepared: t.Prepared) -> None:
        try:
            async with asyncio.timeout(_ABORT_S):
                await self._router.abort_weights(
                    prepared.transaction_id, term=self.term, reason="the trainer gave up"
                )
        except (MilepostError, TimeoutError) as error:
            log.warning("transaction %s: abort failed: %s", prepared.transaction_id, error)
