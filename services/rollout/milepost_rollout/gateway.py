"""The training side of the gateway: prompts leased, rolled out, judged, settled.

    LeasePrompts --> lease loop --> group task --> judge --> Settler --> PutGroups / ReleasePrompts
                        ^            (one a lease)              |
                        |  room: samples that ended             |
                        +---------------------------------------+
                     renew loop --> RenewLeases --> lost ones are cancelled

| loop       | consumes       | produces        | waits for                      | who unblocks it           |
|------------|----------------|-----------------|--------------------------------|---------------------------|
| lease      | room, prompts  | group tasks     | the run; room for a group;     | the trainer; samples that |
|            |                |                 | prompts; Resume while paused   | end; feeders; operators   |
| group task | a lease        | a verdict       | slots, engines, the reward     | other samples, the router |
| settle     | verdicts       | sealed groups,  | verdicts; the ledger           | group tasks; the ledger   |
|            |                | released leases |                                |                           |
| renew      | leases         | lost leases,    | a third of their time to live  | the clock                 |
|            |                | orphans back    |                                |                           |
| refresh    | the run        | its live config | ten seconds                    | the clock                 |

Back-pressure: a group is leased only while the samples not yet generated leave room for it under
`max_concurrent_samples`; groups that wait for their score or seal are bounded by the ledger's admission
alone.

Owned here: `_groups`, the task of every lease that the ledger has not settled. A key enters it when leased
and leaves it when settled, lost, or given back, and never twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from milepost.convert import make_group
from milepost.errors import DeadlineExceeded, InvalidArgument, MilepostError, NotFound, Unavailable
from milepost.types import LeaseKey, PromptLease, PromptLeases, RenewedLeases, Run, RunConfig
from milepost_common.metrics import Instrument
from milepost_common.telemetry import logs, tracing
from milepost_rollout.backoff import Backoff, BackoffPolicy
from milepost_rollout.metrics import GROUPS_IN_FLIGHT, PAUSED, one
from milepost_rollout.orphans import Orphans
from milepost_rollout.roller import GroupRoller, RollRequest
from milepost_rollout.sampler import EnginesUnavailable
from milepost_rollout.settle import Item, Ledger, Settler
from milepost_rollout.status import Counters
from milepost_rollout.verdict import (
    ANSWER_LOST,
    CAME_PAUSED,
    GIVEN_BACK,
    Release,
    Seal,
    fails_fast,
    judge,
    refuse,
)

log = logging.getLogger(__name__)

LEASE_WAIT_S = 5.0
COALESCE_S = 0.005
REFRESH_S = 10.0
DEFAULT_TTL_S = 30.0
_MAX_LEASES = 1024


class LeaseLedger(Ledger, Protocol):
    """What is asked of the buffer; `milepost.client.BufferClient` is one."""

    async def get_run(self, run_id: str) -> Run:
        """Reads the run."""
        ...

    async def lease_prompts(
        self, run_id: str, *, gateway_id: str, instance_id: str, max_prompts: int, max_wait_s: float | None
    ) -> PromptLeases:
        """Claims prompts."""
        ...

    async def renew_leases(
        self, run_id: str, *, instance_id: str, leases: Iterable[LeaseKey], names_all: bool
    ) -> RenewedLeases:
        """Extends leases; names the others of this instance where these are all."""
        ...


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """Who this gateway is and how much it takes on."""

    run_id: str
    gateway_id: str
    instance_id: str
    max_concurrent_samples: int = 256
    drain_s: float = 15.0


class Gateway:
    """Rolls out the prompts of one run until it is stopped.

    Args:
      ledger: the buffer.
      roller: rolls prompts out.
      settings: see `GatewaySettings`.
      counters: what it did so far.
      check_reward: raises InvalidArgument for a reward that cannot be used.
    """

    def __init__(
        self,
        ledger: LeaseLedger,
        *,
        roller: GroupRoller,
        settings: GatewaySettings,
        counters: Counters,
        check_reward: Callable[[str], Awaitable[None]],
    ) -> None:
        self._ledger = ledger
        self._roller = roller
        self._settings = settings
        self._counters = counters
        self._check_reward = check_reward
        self._config = RunConfig()
        self._ttl_s = DEFAULT_TTL_S
        self._groups: dict[LeaseKey, asyncio.Task[None]] = {}
        self._orphans = Orphans()
        self._ungenerated = 0
        """Samples of leased groups that are not generated yet."""
        self._opened = asyncio.Event()
        """Set once the run was read."""
        self._changed = asyncio.Event()
        """Set when room, pause or stop changed."""
        self._paused = False
        self._stopping = False
        self._settler = Settler(
            ledger,
            run_id=settings.run_id,
            instance_id=settings.instance_id,
            counters=counters,
            on_settled=self._forget,
        )

    async def config(self) -> RunConfig:
        """The run's configuration, ten seconds old at most; waits for the run to exist."""
        await self._opened.wait()
        return self._config

    @property
    def paused(self) -> bool:
        """No prompts are leased."""
        return self._paused

    @property
    def groups_in_flight(self) -> int:
        """Groups leased and not settled."""
        return len(self._groups)

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """What it is about, as metrics."""
        return one(GROUPS_IN_FLIGHT, lambda: len(self._groups)), one(PAUSED, lambda: float(self._paused))

    def pause(self) -> None:
        """Leases no more; what is leased goes on."""
        self._paused = True
        self._changed.set()

    def resume(self) -> None:
        """Leases again."""
        self._paused = False
        self._changed.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Waits for the run, rolls out until `stop` is set, then drains.

        Raises:
          InvalidArgument: the run's reward cannot be used; nothing was leased.
        """
        if not await self._open_run(stop):
            return
        settling = asyncio.create_task(self._settler.run())
        renewing = asyncio.create_task(self._renew())
        refreshing = asyncio.create_task(self._refresh())
        leasing = asyncio.create_task(self._lease())
        stopping = asyncio.create_task(stop.wait())
        background = (settling, renewing, refreshing, leasing)
        try:
            await asyncio.wait((stopping, *background), return_when=asyncio.FIRST_COMPLETED)
            self._stopping = True
            await _cancelled(leasing)
            await self._drain()
        finally:
            for task in (*background, stopping, *self._groups.values()):
                task.cancel()
            await asyncio.gather(*background, stopping, *self._groups.values(), return_exceptions=True)
        for task in background:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def _open_run(self, stop: asyncio.Event) -> bool:
        """Reads the run, and waits while it does not exist; False: stopped before it did."""
        backoff = Backoff(BackoffPolicy(first_s=0.2, most_s=2.0))
        run_id = self._settings.run_id
        while not stop.is_set():
            try:
                self._config = (await self._ledger.get_run(run_id)).config
            except NotFound:
                self._wait_for(f"run: {run_id!r} does not exist yet; a trainer creates it")
            except (Unavailable, DeadlineExceeded) as error:
                self._wait_for(f"ledger: {error}")
            else:
                self._counters.leasing = ""
                self._ttl_s = self._config.lease_ttl_s or DEFAULT_TTL_S
                await self._check_run_reward(self._config.reward)
                self._opened.set()
                return True
            await _wait_or_stopped(stop, backoff.next_s())
        return False

    async def _check_run_reward(self, name: str) -> None:
        try:
            await self._check_reward(name)
        except InvalidArgument as error:
            run_id = self._settings.run_id
            error.message += (
                f"; run {run_id!r} was made with it for good: mend the reward, or use another run_id"
            )
            raise

    def _wait_for(self, what: str) -> None:
        if what != self._counters.leasing:
            log.info("waiting for %s", what)
        self._counters.leasing = what

    # ------------------------------------------------------------------ lease

    async def _lease(self) -> None:
        backoff = Backoff(BackoffPolicy(most_s=2.0))
        clock = asyncio.get_running_loop().time
        while True:
            wanted = await self._room_for_groups()
            asked = clock()
            self._orphans.call_asked()
            try:
                leased = await self._ledger.lease_prompts(
                    self._settings.run_id,
                    gateway_id=self._settings.gateway_id,
                    instance_id=self._settings.instance_id,
                    max_prompts=min(wanted, _MAX_LEASES),
                    max_wait_s=LEASE_WAIT_S,
                )
            except MilepostError as error:
                self._counters.leasing = f"ledger: {error}"
                log.warning("cannot lease prompts: %s", error)
                self._end_call()
                await asyncio.sleep(backoff.next_s(asked_s=error.retry_after_s))
                continue
            self._counters.leasing = "" if len(leased.leases) == wanted else f"prompts: {leased.reason}"
            for lease in leased.leases:
                if self._paused:  # while the call was under way
                    self._settler.submit(Item(key=lease.key, release=CAME_PAUSED))
                else:
                    self._start(lease)
            self._end_call()
            if leased.leases or clock() - asked >= 1.0:
                backoff.reset()
            else:  # the ledger did not wait, for example because the run is finished
                await asyncio.sleep(backoff.next_s())

    async def _room_for_groups(self) -> int:
        """Waits until a group may be leased; returns how many."""
        size = max(1, self._config.samples_per_prompt or 1)
        while True:
            room = self._settings.max_concurrent_samples - self._ungenerated
            groups = room // size if self._ungenerated else max(1, room // size)
            if groups > 0 and not self._paused:
                return groups
            self._counters.leasing = "resume: the gateway is paused" if self._paused else ""
            self._changed.clear()
            await self._changed.wait()
            await asyncio.sleep(COALESCE_S)  # samples end together: lease for all of them at once

    def _start(self, lease: PromptLease) -> None:
        if lease.key in self._groups:
            log.error(
                "prompt %r attempt %d was leased twice; one is ignored", lease.key.prompt_id, lease.attempt
            )
            return
        self._ttl_s = lease.ttl_s or self._ttl_s
        self._ungenerated += lease.num_samples
        self._groups[lease.key] = asyncio.create_task(self._roll(lease))

    # ------------------------------------------------------------------ group task

    async def _roll(self, lease: PromptLease) -> None:
        """Rolls a leased prompt out and hands the verdict to the settler."""
        run_id, prompt_id = self._settings.run_id, lease.key.prompt_id
        with (
            logs.about(run=run_id, prompt=prompt_id, version=lease.min_version),
            tracing.span(
                "gateway.rollout",
                parent=lease.prompt.traceparent,
                run_id=run_id,
                prompt_id=prompt_id,
                attempt=lease.attempt,
                min_version=lease.min_version,
                label=lease.label,
            ) as span,
        ):
            try:
                item = await self._roll_to_item(lease, traceparent=span.traceparent)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # a defect must not leave a lease that is renewed for ever
                log.exception("prompt %r: %s", prompt_id, error)
                what = f"defect in the gateway: {type(error).__name__}: {error}"
                item = Item(key=lease.key, release=Release(failed=True, detail=what))
            span.set(outcome=item.release.word if item.release else "rolled")
        self._settler.submit(item)

    async def _roll_to_item(self, lease: PromptLease, *, traceparent: str) -> Item:
        config = self._config
        request = RollRequest(
            prompt=lease.prompt,
            num_samples=lease.num_samples,
            sampling=config.sampling,
            reward=config.reward,
            run_id=self._settings.run_id,
            min_version=lease.min_version,
            session=f"{self._settings.run_id}/{lease.key.prompt_id}/{lease.attempt}",
            fail_fast=fails_fast(config),
        )
        room = _Room(self, lease.num_samples)
        try:
            samples = await self._roller.roll(request, on_generated=room.give_back)
        except InvalidArgument as error:
            log.warning("prompt %r is dropped: %s", lease.key.prompt_id, error)
            return Item(key=lease.key, release=refuse(error))
        except EnginesUnavailable as error:
            return Item(key=lease.key, release=Release(detail=str(error)))
        finally:
            room.give_back_all()
        verdict = judge(samples, config)
        if isinstance(verdict, Seal):
            group = make_group(
                lease.prompt, attempt=lease.attempt, samples=verdict.samples, traceparent=traceparent
            )
            return Item(key=lease.key, group=group)
        if verdict.failed:
            log.warning("prompt %r attempt %d: %s", lease.key.prompt_id, lease.attempt, verdict.detail)
        return Item(key=lease.key, release=verdict)

    def give_room(self, num_samples: int) -> None:
        """Samples were generated, or will not be."""
        self._ungenerated -= num_samples
        self._changed.set()

    def _forget(self, key: LeaseKey) -> None:
        self._groups.pop(key, None)
        self._changed.set()

    # ------------------------------------------------------------------ renew, refresh

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / 3)
            keys = [*self._groups, *self._orphans.suspects]
            names_all = len(keys) <= _MAX_LEASES
            for start in range(0, max(1, len(keys)), _MAX_LEASES):
                await self._renew_some(keys[start : start + _MAX_LEASES], names_all=names_all)

    async def _renew_some(self, keys: list[LeaseKey], *, names_all: bool) -> None:
        try:
            async with asyncio.timeout(max(1.0, self._ttl_s / 3)):
                renewed = await self._ledger.renew_leases(
                    self._settings.run_id,
                    instance_id=self._settings.instance_id,
                    leases=keys,
                    names_all=names_all,
                )
        except (MilepostError, TimeoutError) as error:
            log.warning("cannot renew %d leases: %s", len(keys), str(error) or "no answer")
            return
        for key in renewed.lost:
            self._lose(key)
        self._orphans.lost(renewed.lost)
        self._orphans.named(renewed.unnamed)
        self._give_back_orphans()

    def _end_call(self) -> None:
        """A LeasePrompts is over, whatever it brought."""
        self._orphans.call_ended()
        self._give_back_orphans()

    def _give_back_orphans(self) -> None:
        for key in self._orphans.take(self._groups.keys()):
            log.warning("prompt %r attempt %d was leased to nobody: given back", key.prompt_id, key.attempt)
            self._settler.submit(Item(key=key, release=ANSWER_LOST))

    def _lose(self, key: LeaseKey) -> None:
        task = self._groups.get(key)
        if task is None:
            return
        if task.done():  # it is with the settler: PutGroups answers for itself, a release is done with
            return
        log.warning("the lease of prompt %r attempt %d is lost", key.prompt_id, key.attempt)
        task.cancel()
        self._counters.settled["lease_lost"] += 1
        self._forget(key)

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                self._config = (await self._ledger.get_run(self._settings.run_id)).config
            except MilepostError as error:
                log.warning("cannot read run %r: %s", self._settings.run_id, error)

    # ------------------------------------------------------------------ stop

    async def _drain(self) -> None:
        """Gives work in flight `drain_s`, gives the rest of the prompts back, and settles what is done."""
        tasks = [t for t in self._groups.values() if not t.done()]
        log.info("stopping: %d groups in flight, %g s to finish them", len(tasks), self._settings.drain_s)
        if tasks:
            await asyncio.wait(tasks, timeout=self._settings.drain_s)
        for key, task in list(self._groups.items()):
            if not task.done():
                await _cancelled(task)
            if task.cancelled():
                self._settler.submit(Item(key=key, release=GIVEN_BACK))
        try:
            async with asyncio.timeout(5.0):
                await self._settler.drained()
        except TimeoutError:
            log.warning("%d groups are not settled; their leases will expire", len(self._groups))


class _Room:
    """The part of `max_concurrent_samples` that one group takes; given back sample by sample."""

    def __init__(self, gateway: Gateway, num_samples: int) -> None:
        self._gateway, self._left = gateway, num_samples

    def give_back(self) -> None:
        if self._left:
            self._left -= 1
            self._gateway.give_room(1)

    def give_back_all(self) -> None:
        left, self._left = self._left, 0
        self._gateway.give_room(left)


async def _wait_or_stopped(stop: asyncio.Event, wait_s: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), wait_s)
    except TimeoutError:
        pass


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
