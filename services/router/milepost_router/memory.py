"""Engines that share a GPU with their trainer give up memory while it trains.

    SERVING | STALE ── release ──> UPDATING, "memory is released" ── resume, or the lease ends ──> STALE
                        drained, ended, released                  resumed, goes on; needs weights

The trainer asks, the router drives the engines: no new requests, those in flight may end by themselves for a
while and are ended then, nothing new gets in (paused), and only an engine that has nothing left to do is told
to release. What holds when somebody dies in between:

    trainer   the lease ends: its engines resume, STALE, and are given weights by the next trainer
    engine    it comes up again with memory of its own, as an engine that joins; one that does not take its
              memory back is QUARANTINED until it has been started again
    router    the engine carries a mark, `updating/<phase>/<run>/<until>/<tags>`, by which the next router
              takes the lease over where it stands (`adopt`)

    mark         releasing ── release ──> released ── ... ──> resuming ── resume ──> resumed
    memory       ?                        given up            ?                      there

The next router may be asked before it has looked at an engine, or before that has registered again. So it
keeps what the trainer asked for last, and brings an engine that it finds later to that.

SGLang dies of a second release and of a second resume, and cannot be asked which of them was. So one that is
found in between is started again; an engine of ours refuses what it has done, and is told once more.

An engine is in here as if it were in a weight transaction: `reserve`d and UPDATING in the fleet, so nobody
routes to it, probes it, or makes it a member of another one. This object owns the leases and their tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from milepost.types import EngineState, MemoryChange
from milepost_router.engine_api import EngineApi, EngineBroken, EngineFault, EngineRefused
from milepost_router.fleet import Fleet
from milepost_router.record import EngineRecord
from milepost_router.version_string import UPDATING

log = logging.getLogger(__name__)

RELEASING, RELEASED, RESUMING = (UPDATING + f"{word}/" for word in ("releasing", "released", "resuming"))
RESUMED = UPDATING + "resumed/"
ALL_TAGS = ("kv_cache", "weights", "cuda_graph")
_LOOK_S = 0.02
_REST_S = 10.0
"""How long an engine whose requests have all ended may take to come to rest."""

ApiOf = Callable[[EngineRecord], EngineApi]


@dataclass(frozen=True)
class Lease:
    """Memory that a run's engine has given up.

    Attributes:
      run_id: whose trainer has it.
      until: unix time at which the engine takes it back.
      tags: what was given up.
    """

    run_id: str
    until: int
    tags: tuple[str, ...]

    def __str__(self) -> str:
        return self.mark(RELEASED)

    def mark(self, phase: str) -> str:
        """The version string of an engine in a phase of it."""
        return f"{phase}{self.run_id}/{self.until}/{','.join(self.tags)}"

    @classmethod
    def read(cls, text: str) -> tuple[str, Lease] | None:
        """The phase and the lease that a version string tells; None: none."""
        for phase in (RELEASING, RELEASED, RESUMING):
            if text.startswith(phase):
                run_id, _, rest = text.removeprefix(phase).partition("/")
                until, _, tags = rest.partition("/")
                if run_id and until.isdecimal() and tags:
                    return phase, cls(run_id, int(until), tuple(tags.split(",")))
        return None


class Memory:
    """The leases of this router's engines.

    Args:
      fleet: the engines.
      api: makes the client of an engine.
      abort_grace_s: how long requests that were aborted may take to leave.
    """

    def __init__(self, fleet: Fleet, api: ApiOf, *, abort_grace_s: float) -> None:
        self._fleet, self._api, self._abort_grace_s = fleet, api, abort_grace_s
        self._leases: dict[EngineRecord, Lease] = {}
        self._marked: set[EngineRecord] = set()  # may have released
        self._lent: dict[str, bool] = {}  # by run: what its trainer asked for last, released or resumed
        self._lock = asyncio.Lock()
        self._timers: dict[EngineRecord, asyncio.Task[None]] = {}
        self._asked: set[asyncio.Task[MemoryChange]] = set()
        self._closing = False

    async def close(self) -> None:
        """Gives every engine its memory back, once what is under way has come to its end."""
        self._closing = True
        if self._asked:
            await asyncio.wait(self._asked, timeout=_REST_S)
        tasks: list[asyncio.Task[Any]] = [*self._timers.values(), *self._asked]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._all(list(self._leases), self._resume)

    async def release(
        self, run_id: str, *, tags: Sequence[str], drain_s: float, lease_s: float
    ) -> MemoryChange:
        """Has the run's engines give up memory; those that have already keep their lease, from now on."""
        lease = Lease(run_id, int(time.time() + lease_s) + 1, tuple(tags) or ALL_TAGS)
        return await self._own(self._release_all(lease, drain_s))

    async def _release_all(self, lease: Lease, drain_s: float) -> MemoryChange:
        async with self._lock:
            self._lent[lease.run_id] = True
            held = [e for e in self._leases if self._leases[e].run_id == lease.run_id]
            for record in held:
                self._keep(record, lease.until)
            free = [e for e in self._fleet.of_run(lease.run_id) if self._can_release(e)]

            async def one(record: EngineRecord) -> None:
                await self._release(record, lease, drain_s)

            failed = await self._all(free, one)
        done = [e.engine_id for e in (*held, *free) if e.engine_id not in failed]
        return MemoryChange(engines=tuple(sorted(done)), failed=failed)

    async def resume(self, run_id: str) -> MemoryChange:
        """Has them take it back."""
        return await self._own(self._resume_all(run_id))

    async def _resume_all(self, run_id: str) -> MemoryChange:
        async with self._lock:
            self._lent[run_id] = False
            held = [e for e in self._leases if self._leases[e].run_id == run_id]
            failed = await self._all(held, self._resume_for_weights)
        done = [e.engine_id for e in held if e.engine_id not in failed]
        return MemoryChange(engines=tuple(sorted(done)), failed=failed)

    def adopt(self, record: EngineRecord) -> bool:
        """Takes over the lease that an engine carries from an earlier router; False: it carries none."""
        found = Lease.read(record.version_string)
        if found is None or record.transaction or record.state is not EngineState.STALE:
            return False
        phase, lease = found
        if phase != RELEASED and not record.capabilities.engine.startswith("milepost"):
            why = f"its router died in the middle of {phase.removeprefix(UPDATING)[:-1]} its memory"
            why = f"{why}: whether it has it nobody knows, so it must be started again"
            self._fleet.quarantine(record, why, now=_now(), restart=True)
            return True
        if phase == RESUMING:
            self._lent.setdefault(lease.run_id, False)
        self._enter(record, lease)
        self._marked.add(record)
        if phase != RELEASED or not self._lent.get(lease.run_id, True):
            self._spawn(self._finish(record, again=phase != RELEASED))
        return True

    async def _finish(self, record: EngineRecord, *, again: bool) -> MemoryChange:
        """Has it do what its trainer wants by now; `again`: the router before may have had it do so."""

        async def call(record: EngineRecord) -> None:
            if not self._lent.get(self._leases[record].run_id, True):
                await self._resume(record, again=again, expected=True)
            elif again:
                await self._release_again(record)

        async with self._lock:
            held = [record] if record in self._leases else []
            return MemoryChange(failed=await self._all(held, call))

    # ------------------------------------------------------------------------------------ one engine

    def _can_release(self, record: EngineRecord) -> bool:
        return record.state in (EngineState.SERVING, EngineState.STALE) and not (
            record.transaction or record.suspect or record.leaving or record.cleaning or record.restart
        )

    def _enter(self, record: EngineRecord, lease: Lease) -> None:
        self._fleet.reserve(record, str(lease), run_id=lease.run_id)
        self._fleet.begin_update(record, now=_now())
        record.detail = "its memory is released"
        self._leases[record] = lease
        self._keep(record, lease.until)

    def _keep(self, record: EngineRecord, until: int) -> None:
        """Its lease ends then, and not before."""
        self._forget_timer(record)
        self._timers[record] = asyncio.create_task(
            self._expire(record, until), name=f"memory of {record.engine_id}"
        )

    def _forget_timer(self, record: EngineRecord) -> None:
        timer = self._timers.pop(record, None)
        if timer is not None:
            timer.cancel()

    async def _expire(self, record: EngineRecord, until: int) -> None:
        await asyncio.sleep(max(0.0, until - time.time()))
        del self._timers[record]  # from here on it is no timer that a resume would cancel
        await self._own(self._expired(record))

    async def _expired(self, record: EngineRecord) -> MemoryChange:
        async with self._lock:
            if record not in self._leases or record in self._timers:
                return MemoryChange()  # it was resumed, or asked for again, in this very moment
            log.warning("%s: nobody asked for its memory in time: it takes it back", record.engine_id)
            return MemoryChange(failed=await self._all([record], self._resume))

    async def _release(self, record: EngineRecord, lease: Lease, drain_s: float) -> None:
        """Takes one engine out of routing and has it release, once it is at rest."""
        api = self._api(record)
        self._enter(record, lease)
        await self._until_idle(record, drain_s)
        await api.pause("abort")
        if not await self._until_idle(record, self._abort_grace_s):
            log.warning("%s: %d requests did not end", record.engine_id, record.in_flight)
        await self._at_rest(api)
        await api.set_version(lease.mark(RELEASING))
        self._marked.add(record)
        await api.release_memory(lease.tags)
        await api.set_version(lease.mark(RELEASED))

    async def _release_again(self, record: EngineRecord) -> None:
        """Has an engine of ours release, if it has not; it says what it has."""
        lease, api = self._leases[record], self._api(record)
        with contextlib.suppress(EngineRefused):
            await api.release_memory(lease.tags)
        has: Any = (await api.server_info()).get("released_memory")
        if not set(lease.tags) <= set(has or ()):
            raise EngineBroken(f"{record.engine_id}: told to release {lease.tags}, it has released {has}")
        await api.set_version(lease.mark(RELEASED))

    async def _until_idle(self, record: EngineRecord, within_s: float) -> bool:
        end = _now() + within_s
        while record.in_flight and _now() < end and not self._closing:  # noqa: ASYNC110  (requests leave without a word to us)
            await asyncio.sleep(_LOOK_S)
        return not record.in_flight

    async def _at_rest(self, api: EngineApi) -> None:
        """Waits until it has nothing to do, which it says by flushing its cache."""
        end = _now() + _REST_S
        while True:
            try:
                await api.flush_cache()
                return
            except EngineRefused:
                if _now() >= end:
                    raise
            await asyncio.sleep(_LOOK_S)

    async def _resume_for_weights(self, record: EngineRecord) -> None:
        """By its trainer, which publishes next: requests wait for that."""
        await self._resume(record, expected=True)

    async def _resume(self, record: EngineRecord, *, again: bool = False, expected: bool = False) -> None:
        """Takes one engine's memory back and lets it go on, STALE; `again`: it may have it already."""
        lease = self._leases.pop(record)
        self._forget_timer(record)
        if not self._holds(record, lease):
            self._marked.discard(record)
            return  # another process came up in its place, with memory of its own
        api = self._api(record)
        if record in self._marked:
            await api.set_version(lease.mark(RESUMING))
            try:
                await api.resume_memory(lease.tags)
            except EngineRefused:
                if not again:
                    raise
        self._marked.discard(record)
        mark = RESUMED + lease.run_id
        await api.set_version(mark)
        await api.resume()
        if self._holds(record, lease):
            why = "its memory was released: it needs weights"
            self._fleet.break_off(record, why, mark, now=_now(), expected=expected)

    def _holds(self, record: EngineRecord, lease: Lease) -> bool:
        return record.transaction == str(lease) and record.state is EngineState.UPDATING

    async def _all(
        self, records: Sequence[EngineRecord], call: Callable[[EngineRecord], Awaitable[None]]
    ) -> dict[str, str]:
        """Does it with all at once; who fails is QUARANTINED. Returns who, and why."""
        failed: dict[str, str] = {}

        async def one(record: EngineRecord) -> None:
            try:
                await call(record)
            except EngineFault as fault:
                failed[record.engine_id] = str(fault)
                self._leases.pop(record, None)
                self._forget_timer(record)
                if record.transaction.startswith(RELEASED):  # as every lease's own name does
                    lacks = record in self._marked  # nobody may write weights into memory that is not there
                    self._fleet.quarantine(record, f"its memory: {fault}", now=_now(), restart=lacks)
                self._marked.discard(record)

        await asyncio.gather(*(one(record) for record in records))
        return failed

    async def _own(self, work: Awaitable[MemoryChange]) -> MemoryChange:
        """Does something that must be finished, also when the caller is gone."""

        return await asyncio.shield(self._spawn(work))

    def _spawn(self, work: Awaitable[MemoryChange]) -> asyncio.Task[MemoryChange]:
        async def run() -> MemoryChange:
            return await work

        task = asyncio.create_task(run())
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)
        return task


def _now() -> float:
    return asyncio.get_running_loop().time()
