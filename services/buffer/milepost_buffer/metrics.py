"""What the buffer tells about the ledger and about itself.

    Redis --stats, at each reading--> LedgerView --> gauges of every run     Store, Bell, Prompts: their own

The ledger's counts are facts in Redis, so they are read from there and are right whichever replica is asked;
what this process did (calls to Redis, waits, seals) is its own. Metric names are under `milepost_ledger_`
where they are facts, and then they survive a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from milepost import types as t
from milepost.errors import FailedPrecondition, MilepostError, NotFound
from milepost_common.metrics import Counter, Gauge, Instrument, Kind, Spec

MAX_RUNS = 64
STATS_TIMEOUT_S = 1.5

log = logging.getLogger(__name__)

PROMPTS = Spec(
    "milepost_ledger_prompts",
    Kind.GAUGE,
    "prompts of a run by the state they are in",
    labels=("run", "state"),
    unit="prompt",
    when_bad="`ready` at the bound: the trainer is the slow side; `waiting` at 0: the source is; "
    "`rolling` that never falls: look at engines and rewards",
)
ACCEPTED = Spec(
    "milepost_ledger_accepted", Kind.COUNTER, "prompts accepted from clients", labels=("run",), unit="prompt"
)
DROPPED = Spec(
    "milepost_ledger_dropped",
    Kind.COUNTER,
    "prompts given up, by reason",
    labels=("run", "reason"),
    unit="prompt",
    when_bad="any rate: `milepost ledger --state dropped` names each prompt and why",
)
CREDITS = Spec(
    "milepost_ledger_credits",
    Kind.GAUGE,
    "prompts that may be put now",
    labels=("run",),
    unit="prompt",
    when_bad="0 is back-pressure: rollouts or the trainer are slower than the source, which is no fault",
)
ADMISSIBLE = Spec(
    "milepost_ledger_admissible",
    Kind.GAUGE,
    "groups that may start rolling now by the staleness rule and by bytes",
    labels=("run",),
    unit="group",
    when_bad="0 with few groups ready: publication lags, or payload bytes are at their limit",
)
PAYLOAD_BYTES = Spec(
    "milepost_ledger_payload_bytes",
    Kind.GAUGE,
    "payload bytes held in Redis",
    labels=("run",),
    unit="By",
    when_bad="near its limit: checkpoint more often (payloads live until one contains their step), or raise "
    "max_payload_bytes",
)
PAYLOAD_LIMIT = Spec(
    "milepost_ledger_payload_limit_bytes",
    Kind.GAUGE,
    "their limit, max_payload_bytes",
    labels=("run",),
    unit="By",
)
STEPS = Spec(
    "milepost_ledger_step",
    Kind.GAUGE,
    "newest step that is leased, committed, published (as a weight label) and trimmed",
    labels=("run", "mark"),
    unit="step",
    when_bad="committed stands still: see who waits; published behind committed: see the fleet; trimmed far "
    "behind: no checkpoint was saved",
)
VERSION = Spec(
    "milepost_ledger_weight_version",
    Kind.GAUGE,
    "newest published weight version",
    labels=("run",),
    unit="version",
)
TERM = Spec(
    "milepost_ledger_term",
    Kind.GAUGE,
    "newest term of the publisher",
    labels=("run",),
    unit="term",
    when_bad="it grows with each start of a trainer: growing by itself, the trainer crashes in a loop",
)
OPEN_SOURCES = Spec(
    "milepost_ledger_open_sources",
    Kind.GAUGE,
    "sources that may still put prompts",
    labels=("run",),
    unit="source",
)
LEASE_EXPIRIES = Spec(
    "milepost_ledger_lease_expiries",
    Kind.COUNTER,
    "leases of prompts that ran out",
    labels=("run",),
    unit="lease",
    when_bad="a gateway died, hangs, or cannot reach the buffer for lease_ttl_s",
)
REQUEUES = Spec(
    "milepost_ledger_stale_requeues",
    Kind.COUNTER,
    "groups that became too stale and were rolled again",
    labels=("run",),
    unit="group",
    when_bad="a steady rate is work thrown away: lower max_staleness or the number of samples in flight",
)
MAX_STALENESS = Spec(
    "milepost_ledger_staleness_max",
    Kind.GAUGE,
    "largest staleness of any group that was ever given to a step",
    labels=("run",),
    unit="step",
    when_bad="above the run's max_staleness: report it, for the ledger must not allow that",
)
REDIS_UP = Spec(
    "milepost_redis_up",
    Kind.GAUGE,
    "1 while Redis answers within a second and a half",
    when_bad="0: every client waits for Redis; the series of milepost_ledger_ are missing meanwhile",
)
REDIS_SECONDS = Spec(
    "milepost_redis_call_seconds",
    Kind.HISTOGRAM,
    "time of one call to Redis, by the ledger's command",
    labels=("command",),
    unit="s",
    when_bad="all slow: the disk under appendfsync always, or Redis short of CPU; one command: its size",
)
REDIS_ERRORS = Spec(
    "milepost_redis_errors",
    Kind.COUNTER,
    "calls to Redis that failed, by reason",
    labels=("reason",),
    unit="call",
    when_bad="REDIS_AWAY: it is down or out of reach; REDIS_FULL: raise its maxmemory",
)
WAITED = Spec(
    "milepost_waited_seconds",
    Kind.COUNTER,
    "seconds that callers of the buffer waited, by who waited and for what",
    labels=("who", "what"),
    unit="s",
    when_bad="trainer for groups: add engines; gateway for the staleness bound: the trainer is the slow "
    "side; gateway for prompts: the source is; feeder for credits: back-pressure as meant",
)
SEALS = Spec(
    "milepost_seals",
    Kind.COUNTER,
    "groups that gateways put, by the answer",
    labels=("status",),
    unit="group",
    when_bad="lease_lost: leases expire before groups are done, raise lease_ttl_s; conflict or invalid: the "
    "gateway's log names the group",
)
SEALED_BYTES = Spec("milepost_sealed_bytes", Kind.COUNTER, "payload bytes of sealed groups", unit="By")
PUTS_REFUSED = Spec(
    "milepost_puts_refused",
    Kind.COUNTER,
    "calls of PutPrompts that were sent away, by what was lacking",
    labels=("reason",),
    unit="call",
    when_bad="no_bytes: the trainer must checkpoint; no_credits is back-pressure as meant",
)
SPECS = (
    PROMPTS, ACCEPTED, DROPPED, CREDITS, ADMISSIBLE, PAYLOAD_BYTES, PAYLOAD_LIMIT, STEPS, VERSION, TERM,
    OPEN_SOURCES, LEASE_EXPIRIES, REQUEUES, MAX_STALENESS, REDIS_UP, REDIS_SECONDS, REDIS_ERRORS, WAITED,
    SEALS, SEALED_BYTES, PUTS_REFUSED,
)  # fmt: skip


class Stats(Protocol):
    """Where the counts are; `milepost_buffer.accounts.Accounts` is one."""

    async def stats(self, run_id: str) -> t.RunStats:
        """Counts of one run."""
        ...


class Runs(Protocol):
    """Which runs there are; `milepost_buffer.store.Store` is one."""

    @property
    def asked_at(self) -> Mapping[str, float]:
        """When somebody last asked about each."""
        ...

    async def runs(self) -> list[str]:
        """Their ids."""
        ...


class LedgerView:
    """Reads the ledger's counts for each reading of metrics; of at most `MAX_RUNS` runs."""

    def __init__(self, accounts: Stats, store: Runs) -> None:
        self._accounts, self._store = accounts, store

    async def refresh(self) -> Iterable[Instrument]:
        """Instruments with the counts as they are now, of as many runs as the time allows.

        Where Redis is away, `milepost_redis_up` alone.
        """
        up, counted = Gauge(REDIS_UP), list[t.RunStats]()
        try:
            async with asyncio.timeout(STATS_TIMEOUT_S):
                for run_id in await self._run_ids():
                    if stats := await self._of(run_id):
                        counted.append(stats)
        except (MilepostError, TimeoutError) as error:
            if isinstance(error, MilepostError) or not counted:
                up.set(0)
                return [up]
        up.set(1)
        return [up, *_instruments(counted)]

    async def _run_ids(self) -> list[str]:
        """The runs, those first that were asked about last."""
        asked_at = self._store.asked_at
        known = sorted(await self._store.runs(), key=lambda run_id: -asked_at.get(run_id, 0.0))
        return known[:MAX_RUNS]

    async def _of(self, run_id: str) -> t.RunStats | None:
        try:
            return await self._accounts.stats(run_id)
        except NotFound:  # named by a CreateRun that did not come through
            return None
        except FailedPrecondition as error:  # of another schema: no reason to tell nothing of the others
            log.debug("run %s is left out of the metrics: %s", run_id, error)
            return None


def _instruments(counted: Iterable[t.RunStats]) -> Iterable[Instrument]:
    found: dict[str, Counter | Gauge] = {}
    for stats in counted:
        for spec, labels, value in _facts(stats):
            kind = Counter if spec.kind is Kind.COUNTER else Gauge
            found.setdefault(spec.name, kind(spec)).cell(stats.run_id, *labels).value = value
    return found.values()


def _facts(s: t.RunStats) -> Iterator[tuple[Spec, tuple[str, ...], float]]:
    """Every number of one run, with the labels after the run's."""
    states = {
        "waiting": s.waiting, "rolling": s.rolling, "ready": s.ready, "assigned": s.assigned,
        "trained": s.trained, "dropped": sum(s.dropped.values()),
    }  # fmt: skip
    yield from ((PROMPTS, (state,), count) for state, count in states.items())
    reasons = (r.name.lower() for r in t.DropReason if r)
    yield from ((DROPPED, (reason,), s.dropped.get(reason, 0)) for reason in reasons)
    marks = {
        "leased": s.leased_step, "committed": s.committed_step, "published": s.weight_label,
        "trimmed": s.trimmed_step,
    }  # fmt: skip
    yield from ((STEPS, (mark,), step) for mark, step in marks.items())
    plain: dict[Spec, float] = {
        ACCEPTED: s.accepted, CREDITS: s.credits, ADMISSIBLE: s.admissible, PAYLOAD_BYTES: s.payload_bytes,
        PAYLOAD_LIMIT: s.max_payload_bytes, VERSION: s.weight_version, TERM: s.term,
        OPEN_SOURCES: s.open_sources, LEASE_EXPIRIES: s.expired_leases, REQUEUES: s.stale_requeues,
        MAX_STALENESS: s.max_staleness_seen,
    }  # fmt: skip
    yield from ((spec, (), value) for spec, value in plain.items())
