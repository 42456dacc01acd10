"""Looks at every engine, and at once at one that a connection broke to.

    each interval, each engine:  is it alive, /model_info ──> fleet.probe_ok / probe_failed
                                 first look: /server_info, its routes ──> what it can do
    a STALE engine with complete weights ──> the ledger's word ──> resume it ──> fleet.admit
    an engine with half an update and no transaction ──> end its requests, resume it; it stays STALE

SGLang's /health generates a token, so it takes a second and fails while the engine is paused. It is asked
once, to learn whether the engine has started; from then on /server_info, which its scheduler answers, is the
sign of life. That holds decoding up for some milliseconds, for it lists all that the server was started with;
so it is not asked where tokens came since the round before. An engine joins by its URL alone; one that our
launcher started also has its GPUs' UUIDs.

The prober owns its tasks: the round, and at most one look an engine. Each look has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from milepost import types as t
from milepost.types import EngineState, Transport
from milepost_router import version_string
from milepost_router.engine_api import EngineApi, EngineBroken, EngineFault, EngineRefused
from milepost_router.fleet import Fleet
from milepost_router.ledger import Ledger
from milepost_router.record import EngineRecord
from milepost_router.upstream import Pool

log = logging.getLogger(__name__)

WEIGHT_HOOK = "milepost_engine.weight_hook.load"
"""Our loader of weights: an engine has it if its server was told of it."""
ApiOf = Callable[[EngineRecord], EngineApi]


class Prober:
    """Keeps the fleet's states true.

    Args:
      fleet: the engines.
      pool: connections, swept of idle ones at each round.
      api: makes the client of an engine.
      ledger: proves versions; None: there is none.
      interval_s, timeout_s: how often, and for how long.
      adopt: takes over an engine whose memory an earlier router had it release; False: it is none.
    """

    def __init__(
        self,
        fleet: Fleet,
        pool: Pool,
        api: ApiOf,
        *,
        ledger: Ledger | None,
        interval_s: float,
        timeout_s: float,
        adopt: Callable[[EngineRecord], bool] = lambda _: False,
    ) -> None:
        self._adopt = adopt
        self._fleet, self._pool, self._api, self._ledger = fleet, pool, api, ledger
        self._interval_s, self._timeout_s = interval_s, timeout_s
        self._looks: dict[EngineRecord, asyncio.Task[None]] = {}
        self._round: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the rounds."""
        self._round = asyncio.create_task(self._rounds(), name="probe rounds")

    async def close(self) -> None:
        """Ends every look."""
        tasks = [*self._looks.values(), *([self._round] if self._round else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def look_at(self, record: EngineRecord) -> None:
        """Looks at an engine now, if nobody does."""
        if record not in self._looks and record.state is not EngineState.UPDATING:
            task = asyncio.create_task(self._look(record), name=f"probe {record.engine_id}")
            self._looks[record] = task
            task.add_done_callback(lambda done: self._looked(record, done))

    def look_at_url(self, url: str) -> None:
        """Looks at the engine that listens there."""
        for record in self._fleet:
            if record.url == url:
                self.look_at(record)

    def _looked(self, record: EngineRecord, done: asyncio.Task[None]) -> None:
        self._looks.pop(record, None)
        if not done.cancelled() and done.exception() is not None:
            log.error("probe of %s failed", record.engine_id, exc_info=done.exception())

    async def _rounds(self) -> None:
        while True:
            for record in list(self._fleet):
                self.look_at(record)
                self._pool.sweep(record.url)
            await asyncio.sleep(self._interval_s)

    async def _look(self, record: EngineRecord) -> None:
        """One look at one engine."""
        generation = record.generation
        api = self._api(record)
        loop = asyncio.get_running_loop()
        try:
            if not record.capabilities.engine:
                self._fleet.capable(record, await _capabilities(record, api))
            text = await self._alive(record, api)
        except EngineFault as fault:
            self._fleet.probe_failed(record, str(fault), generation=generation)
            return
        new = record.state in (EngineState.JOINING, EngineState.DEAD)
        self._fleet.probe_ok(record, text, generation=generation, now=loop.time())
        if record.state is EngineState.STALE and not record.transaction and not self._fleet.unversioned:
            await self._settle(record, api, new=new)

    async def _alive(self, record: EngineRecord, api: EngineApi) -> str:
        """Makes sure that it lives; returns its version string."""
        ours = record.capabilities.engine.startswith("milepost")
        if ours:
            await api.health(timeout_s=self._timeout_s)
        elif not self._generates(record):
            await api.server_info(timeout_s=self._timeout_s)
        text = _version_of(record, await api.model_info(timeout_s=self._timeout_s))
        new = record.state in (EngineState.JOINING, EngineState.DEAD)
        if new and not ours and not version_string.is_written(text):
            with contextlib.suppress(EngineRefused):  # a server that cannot go on was never paused
                await api.resume()  # a router that died in this very moment may have paused it
            await api.health(timeout_s=self._timeout_s)
            await self._warm_up(record, api)
        return text

    def _generates(self, record: EngineRecord) -> bool:
        """Tokens of it came since the round before, so its scheduler lives."""
        since = asyncio.get_running_loop().time() - self._interval_s
        return record.generated_at >= since and record.state is EngineState.SERVING and not record.suspect

    async def _warm_up(self, record: EngineRecord, api: EngineApi) -> None:
        """Has its checksum compiled now, which takes seconds, instead of while it is paused for an update."""
        if record.capabilities.checksum:
            with contextlib.suppress(EngineFault):
                await api.checksum()

    async def _settle(self, record: EngineRecord, api: EngineApi, *, new: bool) -> None:
        """Admits an engine with complete weights; frees one that an earlier router left in mid-update."""
        if self._adopt(record):
            return
        if record.version_string.startswith(version_string.UPDATING) and new:
            with contextlib.suppress(EngineFault):
                await api.abort_all()
                await api.resume()
        elif record.loaded is not None and self._ledger is not None:
            await self._prove(record, api, self._ledger)

    async def _prove(self, record: EngineRecord, api: EngineApi, ledger: Ledger) -> None:
        loaded, generation = record.loaded, record.generation
        assert loaded is not None
        if record.home_run not in ("", loaded.run_id):
            self._fleet.explain(
                record, f"holds weights of run {loaded.run_id}, but works for {record.home_run}"
            )
            return
        members = tuple(e.engine_id for e in self._fleet if e.loaded == loaded)
        why_not = await ledger.judge(loaded, members)
        if why_not:
            self._fleet.explain(record, why_not)
            return
        with contextlib.suppress(EngineFault):
            if record.transaction or record.generation != generation:
                return
            await api.resume()  # the router that paused it may be gone
            self._fleet.admit(record, loaded, generation=generation)


def _version_of(record: EngineRecord, info: dict[str, Any]) -> str:
    text: object = info.get("weight_version")
    if not isinstance(text, str):
        raise EngineBroken(f"{record.engine_id}: /model_info: weight_version = {text!r} is no string")
    return text


async def _capabilities(record: EngineRecord, api: EngineApi) -> t.EngineCapabilities:
    """What an engine can do: what its release says, the routes it has, and what its launcher registered."""
    info = await api.server_info()
    registered = record.capabilities
    found = dataclasses.replace(
        capabilities_of(info, gpu_uuids=registered.gpu_uuids),
        restartable=registered.restartable,
        nccl_version=registered.nccl_version,
    )
    if found.engine.startswith("milepost"):
        return found
    record.caches_prefixes = not info.get("disable_radix_cache")
    if _keeps_prefixes(info):
        log.warning(
            "%s: %s flushes its prefix cache only at rest, so requests that an update holds may go on from "
            "KV of older weights; start it with --disable-radix-cache, or take a newer release",
            record.engine_id,
            found.engine,
        )
    return dataclasses.replace(
        found,
        update_session=await api.has_route("/begin_weight_update"),
        checksum=await api.has_route("/weights_checker"),
    )


def _keeps_prefixes(info: dict[str, Any]) -> bool:
    """Its prefix cache outlives an update under load: so it is before 0.5.21."""
    return _numbers(str(info.get("version") or "0")) < (0, 5, 21) and not info.get("disable_radix_cache")


def capabilities_of(info: dict[str, Any], *, gpu_uuids: tuple[str, ...] = ()) -> t.EngineCapabilities:
    """What an engine can do, from its /server_info; a release tells its rules.

    Args:
      info: the answer of /server_info.
      gpu_uuids: its GPUs, one a tensor-parallel rank, where its launcher registered them: weights go by CUDA
        IPC to these alone.
    """
    release = str(info.get("version") or "0")
    numbers = _numbers(release)
    ours = info.get("engine") == "milepost_engine"
    ranks = _positive(info.get("tp_size"), 1)
    if ours:
        transports = (Transport.GLOO, Transport.SHM, Transport.DISK)
    else:
        by_ipc = (Transport.CUDA_IPC,) if len(gpu_uuids) == ranks else ()
        transports = (Transport.NCCL, *by_ipc, Transport.DISK)
    return t.EngineCapabilities(
        engine=f"{'milepost' if ours else 'sglang'} {release}",
        update_session=numbers >= (0, 5, 21),
        version_spans=numbers >= (0, 5, 19),
        checksum=numbers >= (0, 5, 17),
        transports=transports,
        tensor_parallel_size=ranks,
        gpu_uuids=gpu_uuids,
        context_length=_positive(info.get("context_length"), 0),
        weight_hook=WEIGHT_HOOK if WEIGHT_HOOK in (info.get("custom_weight_loader") or ()) else "",
    )


def _numbers(release: str) -> tuple[int, ...]:
    """(0, 5, 21) of "0.5.21.post1"."""
    numbers: list[int] = []
    for part in release.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _positive(value: object, default: int) -> int:
    return value if isinstance(value, int) and value > 0 else default
