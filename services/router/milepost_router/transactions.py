"""All weight transactions of this router: at most one open a run, fenced by the publisher's term.

Prepare: fence by term ──> end what is open ──> choose members ──> lease the run ──> reserve a number ──> open

- The highest term seen of each run is kept; a lower one is refused, a higher one ends the open transaction.
- The same prepare asked again, before its first bucket, answers the same transaction; one with another
  attempt ends it.
- Finished transactions are remembered for a while, so that Commit and Abort can be asked again.
- An open transaction has a deadline, and renews the router's lease of its run; losing the lease aborts it.
- A stream that ends after everything was transferred leaves `commit_wait_s` for the commit; one that ends
  before (a trainer that was killed, or gave up) aborts at once.

This object owns the transactions and every task around them.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import Awaitable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from milepost import types as t
from milepost.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MilepostError,
    NotFound,
    StaleTerm,
    Unavailable,
)
from milepost.types import EngineState, Transport
from milepost_common.telemetry import logs, tracing
from milepost_router.fleet import Fleet
from milepost_router.grouping import Grouping
from milepost_router.ledger import LEASE_TTL_S, Ledger, Publication, RouterHeld
from milepost_router.member import Member
from milepost_router.metrics import TransactionMeter
from milepost_router.probe import ApiOf
from milepost_router.record import EngineRecord
from milepost_router.settings import RouterSettings
from milepost_router.transaction import COLLECTIVE, Plan, Transaction

T = TypeVar("T")

REMEMBERED = 64
_RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_MAX_TIMEOUT_S = 3600.0

log = logging.getLogger(__name__)


class Transactions:
    """Opens, finds and ends transactions.

    Args:
      fleet: the engines.
      api: makes the client of an engine.
      ledger: numbers and labels; None: there is none, and no weights can be given.
      settings: the router's.

    Attributes:
      meter: what is counted of them.
    """

    def __init__(self, fleet: Fleet, api: ApiOf, *, ledger: Ledger | None, settings: RouterSettings) -> None:
        self._fleet, self._api, self._ledger, self._settings = fleet, api, ledger, settings
        self.meter = TransactionMeter()
        self._terms: dict[str, int] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._open: dict[str, Transaction] = {}
        self._all: OrderedDict[str, Transaction] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._grouping = Grouping(pause_s=settings.quarantine_s, pause_max_s=settings.quarantine_max_s)

    async def close(self) -> None:
        """Aborts what is open; members are settled when it returns."""
        for transaction in list(self._open.values()):
            await transaction.abort("the router is stopping")
            await transaction.settled()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------ prepare

    async def prepare(self, request: t.PrepareRequest) -> t.Prepared:
        """Opens a transaction.

        Raises:
          InvalidArgument: a field is wrong.
          StaleTerm: a newer trainer was seen.
          FailedPrecondition: there is no ledger.
          NotFound: a named engine is not known.
          Unavailable: the ledger is away, or another router runs this run's transactions.
        """
        _validate(request)
        if self._ledger is None:
            raise FailedPrecondition(
                "this router has no buffer, so there are no weight versions; set [router] buffer",
                reason="NO_LEDGER",
            )
        self._fence(request.run_id, request.term)
        return await self._own(self._prepare_alone(request, self._ledger))

    async def _prepare_alone(self, request: t.PrepareRequest, ledger: Ledger) -> t.Prepared:
        """One preparation of a run at a time; what is open makes room."""
        async with self._locks.setdefault(request.run_id, asyncio.Lock()):
            self._fence(request.run_id, request.term)
            current = self._open.get(request.run_id)
            if current is not None and _is_same(current, request):
                return current.prepared
            if current is not None:
                await current.abort(f"term {request.term} prepared attempt {request.attempt}")
            return await self._prepare(request, ledger)

    def _fence(self, run_id: str, term: int) -> None:
        """Keeps the highest term of a run and refuses lower ones."""
        highest = self._terms.get(run_id, 0)
        if term < highest:
            raise StaleTerm(
                f"term = {term} of run {run_id!r} is over: term {highest} was seen; this trainer was "
                "replaced and must stop",
                metadata={"term": str(highest)},
            )
        if term > highest:
            self._terms[run_id] = term
            current = self._open.get(run_id)
            if current is not None and current.plan.request.term < term:
                self._spawn(current.abort(f"term {term} has replaced term {current.plan.request.term}"))

    async def _prepare(self, request: t.PrepareRequest, ledger: Ledger) -> t.Prepared:
        if not self._members(request):
            await self._restate(request, ledger)
            return t.Prepared(version=request.version, fleet_epoch=self._fleet.fleet_epoch)
        await ledger.lease(request.run_id)
        version = await self._number(request, ledger)
        records = self._members(request)  # the fleet may have changed meanwhile
        if not records:
            return t.Prepared(version=version, fleet_epoch=self._fleet.fleet_epoch)
        transaction = self._make(request, version, records)
        for member in transaction.members:
            self._fleet.reserve(member.record, transaction.plan.transaction_id, run_id=request.run_id)
        self._open[request.run_id] = transaction
        self._remember(transaction)
        if transaction.plan.collective:
            transaction.open_group()
        with about(transaction), tracing.apart():
            self._spawn(self._watch(transaction, ledger))
        return transaction.prepared

    async def _restate(self, request: t.PrepareRequest, ledger: Ledger) -> None:
        """States what engines serve to the ledger, for Redis may forget; mostly it knows.

        A publisher asks for a label that everybody serves already only where its ledger says otherwise, or
        where the answer to a commit was lost.
        """
        serving = [
            e
            for e in self._fleet.of_run(request.run_id)
            if e.state is EngineState.SERVING and e.version and e.label == request.label
        ]
        if request.version or not serving:
            return
        version = max(e.version for e in serving)
        members = tuple(e.engine_id for e in serving if e.version == version)
        stated = Publication(
            run_id=request.run_id, term=request.term, version=version, label=request.label, members=members,
            allow_older_label=False,
        )  # fmt: skip
        try:
            await ledger.restate(stated)
        except StaleTerm:
            raise
        except FailedPrecondition as error:  # it will never hold it: members of the next transaction
            self._fleet.disown(request.run_id, version, str(error))
            raise

    async def _number(self, request: t.PrepareRequest, ledger: Ledger) -> int:
        if request.version:
            await ledger.check_published(request.run_id, request.version, request.label)
            return request.version
        return await ledger.reserve(
            request.run_id,
            term=request.term,
            step=request.label,
            attempt=request.attempt,
            at_least=self._fleet.highest_version(request.run_id) + 1,
        )

    def _members(self, request: t.PrepareRequest) -> list[EngineRecord]:
        """Engines that need these weights and can take them now."""
        now = asyncio.get_running_loop().time()
        if request.engine_ids:
            named = [self._fleet.known(engine_id) for engine_id in request.engine_ids]
            for record in named:
                _require_takes(record, request)
            return [e for e in named if self._fleet.eligible(e, now)]
        needy = [
            e
            for e in self._fleet.of_run(request.run_id)
            if self._fleet.eligible(e, now) and _takes(e, request.transport) and not _serves(e, request)
        ]
        if request.transport not in COLLECTIVE:
            return needy
        return self._grouping.choose(request.run_id, needy, now=now)

    def _make(self, request: t.PrepareRequest, version: int, records: list[EngineRecord]) -> Transaction:
        name = f"{request.run_id}/{request.term}/{version}/{request.attempt}"
        group = (request.group_name or name) if request.transport is Transport.GLOO else ""
        timeout_s = min(request.timeout_s or self._settings.transaction_timeout_s, _MAX_TIMEOUT_S)
        plan = Plan(
            transaction_id=name if name not in self._all else f"{name}/{len(self._all)}",
            request=request,
            version=version,
            fleet_epoch=self._fleet.fleet_epoch,
            group_name=group,
            expires_at=asyncio.get_running_loop().time() + timeout_s,
            join_timeout_s=self._join_timeout_s(records),
            bucket_timeout_s=self._settings.bucket_timeout_s,
            straggler_s=self._settings.engine_call_timeout_s,
            verify_checksum=self._settings.verify_checksum,
            manifest={spec.name: spec for spec in request.manifest},
        )
        members: list[Member] = []
        rank = 1
        for record in records:
            member = Member(
                self._fleet,
                record,
                self._api(record),
                transaction_id=plan.transaction_id,
                group_name=group,
                rank_offset=rank,
                call_timeout_s=self._settings.engine_call_timeout_s,
            )
            members.append(member)
            rank += member.ranks
        return Transaction(
            plan,
            members,
            publish=self._publish,
            committed=self._committed,
            broken=self._broken,
            clock=self.meter.begin(),
        )

    # ------------------------------------------------------------------------------------ buckets and the end

    def find(self, transaction_id: str) -> Transaction:
        """The transaction of that name.

        Raises:
          NotFound: none, or it ended long ago, or in another life of the router.
        """
        transaction = self._all.get(transaction_id)
        if transaction is None:
            raise NotFound(
                f"transaction_id = {transaction_id!r} is not known to this router (it may have restarted); "
                "look at the fleet and prepare again",
                reason="TRANSACTION_UNKNOWN",
            )
        return transaction

    async def commit(
        self, transaction_id: str, *, fleet_epoch: int, term: int, num_buckets: int
    ) -> t.Committed:
        """Commits a transaction; goes on when the caller leaves."""
        transaction = self.find(transaction_id)
        self._require_term(transaction, term)
        with about(transaction):
            return await self._own(transaction.commit(fleet_epoch=fleet_epoch, num_buckets=num_buckets))

    async def abort(self, transaction_id: str, *, term: int, reason: str) -> tuple[str, ...]:
        """Ends a transaction without publishing; returns the engines that are STALE now."""
        transaction = self.find(transaction_id)
        self._require_term(transaction, term)
        with about(transaction):
            return await self._own(transaction.abort(f"the trainer says: {reason or 'no reason given'}"))

    def stream_ended(self, transaction_id: str) -> None:
        """The trainer's stream of buckets is over, however it ended."""
        transaction = self._all.get(transaction_id)
        if transaction is None or not transaction.is_open:
            return
        if transaction.is_transferred:
            self._spawn(self._await_commit(transaction))
        else:
            self._spawn(transaction.abort("the trainer's stream ended before all tensors were sent"))

    def _require_term(self, transaction: Transaction, term: int) -> None:
        self._fence(transaction.plan.request.run_id, term)
        if term != transaction.plan.request.term:
            raise FailedPrecondition(
                f"term = {term}, but transaction {transaction.plan.transaction_id} belongs to term "
                f"{transaction.plan.request.term}; prepare again",
                reason="TRANSACTION_OVER",
            )

    async def _await_commit(self, transaction: Transaction) -> None:
        wait_s = self._settings.commit_wait_s
        try:
            async with asyncio.timeout(wait_s):
                await transaction.ended.wait()
        except TimeoutError:
            await transaction.abort(f"no commit came within {wait_s:g} s after the last bucket")

    async def _watch(self, transaction: Transaction, ledger: Ledger) -> None:
        """Keeps the lease while it is open, and ends it at its deadline."""
        run_id = transaction.plan.request.run_id
        loop = asyncio.get_running_loop()
        while not transaction.ended.is_set():
            left_s = transaction.plan.expires_at - loop.time()
            if left_s <= 0:
                await transaction.abort("its deadline passed")
                break
            try:
                async with asyncio.timeout(min(left_s, LEASE_TTL_S / 3)):
                    await transaction.ended.wait()
            except TimeoutError:
                await self._renew(transaction, ledger)
        if self._open.get(run_id) is transaction:
            del self._open[run_id]

    async def _renew(self, transaction: Transaction, ledger: Ledger) -> None:
        try:
            await ledger.lease(transaction.plan.request.run_id)
        except RouterHeld as error:
            await transaction.abort(str(error))
        except (Unavailable, DeadlineExceeded) as error:
            log.warning("transaction %s: lease not renewed: %s", transaction.plan.transaction_id, error)
        except MilepostError as error:
            await transaction.abort(f"the lease of its run was refused: {error}")

    async def _publish(self, transaction: Transaction, members: tuple[str, ...]) -> bool:
        """Publishes a committed version; one that was published before needs nothing."""
        plan = transaction.plan
        assert self._ledger is not None
        if plan.request.version:
            return True
        serving = [e for e in self._fleet.of_run(plan.request.run_id) if e.state is EngineState.SERVING]
        return await self._ledger.publish(
            Publication(
                run_id=plan.request.run_id,
                term=plan.request.term,
                version=plan.version,
                label=plan.request.label,
                members=members,
                allow_older_label=all(e.label <= plan.request.label for e in serving),
            )
        )

    def _committed(self, transaction: Transaction) -> None:
        plan, run_id = transaction.plan, transaction.plan.request.run_id
        log.info("run %s: version %d, label %d, is served", run_id, plan.version, plan.request.label)
        self._fleet.outdate(run_id, plan.version)
        if plan.collective:
            records = [m.record for m in transaction.members if not m.failed]
            self._grouping.committed(run_id, records, fleet=self._fleet.of_run(run_id))

    def _broken(self, transaction: Transaction) -> None:
        """A group broke: unless a member is known to have failed, the next ones are to find out who did."""
        records = [m.record for m in transaction.members]
        if all(e.state in (EngineState.SERVING, EngineState.STALE) for e in records):
            run_id, now = transaction.plan.request.run_id, asyncio.get_running_loop().time()
            self._grouping.broke(run_id, records, fleet=self._fleet.of_run(run_id), now=now)

    def _join_timeout_s(self, records: list[EngineRecord]) -> float:
        """One that broke its last group does not keep the trainer waiting for long."""
        alone = self._grouping.is_loner(records[0])
        return self._settings.engine_call_timeout_s if alone else self._settings.bucket_timeout_s

    # ------------------------------------------------------------------------------------ within

    def _remember(self, transaction: Transaction) -> None:
        self._all[transaction.plan.transaction_id] = transaction
        for name in list(self._all)[:-REMEMBERED]:
            if not self._all[name].is_open:
                del self._all[name]

    async def _own(self, work: Awaitable[T]) -> T:
        """Does something that must be finished, also when the caller is gone."""
        return await asyncio.shield(self._spawn(work))

    def _spawn(self, work: Awaitable[T]) -> asyncio.Task[T]:
        async def run() -> T:
            return await work

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            if not isinstance(error, MilepostError):
                log.error("a weight transaction failed", exc_info=error)


def about(transaction: Transaction) -> AbstractContextManager[None]:
    """Binds what log lines of a block are about."""
    plan = transaction.plan
    return logs.about(run=plan.request.run_id, version=plan.version, step=plan.request.label)


def _validate(request: t.PrepareRequest) -> None:
    """Refuses a request that makes no sense.

    Raises:
      InvalidArgument: names the field, its value and the remedy.
    """
    if not _RUN_ID.fullmatch(request.run_id) or request.run_id == "updating":
        raise InvalidArgument(f"run_id = {request.run_id!r}: give 1 to 128 characters of [A-Za-z0-9._-]")
    if request.term < 1 or request.attempt < 1:
        raise InvalidArgument(
            f"term = {request.term}, attempt = {request.attempt}: both count from 1; take the term that "
            "ResumeConsumer gave"
        )
    if request.transport not in (Transport.GLOO, Transport.SHM, Transport.CUDA_IPC, Transport.DISK):
        raise InvalidArgument(f"transport = {request.transport.name}: give GLOO, SHM, CUDA_IPC or DISK")
    if request.transport is Transport.GLOO and not (request.master_address and request.master_port):
        raise InvalidArgument(
            f"master_address = {request.master_address!r}, master_port = {request.master_port}: gloo needs "
            "the address at which rank 0 listens"
        )
    if not request.manifest and request.transport is not Transport.DISK:
        raise InvalidArgument("manifest is empty; name every tensor that will be sent")
    if len({spec.name for spec in request.manifest}) != len(request.manifest):
        raise InvalidArgument("manifest names a tensor twice; name each once")


def _is_same(transaction: Transaction, request: t.PrepareRequest) -> bool:
    """It is the same prepare again, because its answer was lost."""
    fresh = transaction.is_open and transaction.num_buckets == 0 and not transaction.why_aborted
    return fresh and transaction.plan.request == request


def _serves(record: EngineRecord, request: t.PrepareRequest) -> bool:
    """It serves what is being published."""
    if record.state is not EngineState.SERVING or record.version == 0:
        return False
    if request.version:
        return record.version == request.version
    return record.label == request.label


def _takes(record: EngineRecord, transport: Transport) -> bool:
    return not record.capabilities.transports or transport in record.capabilities.transports


def _require_takes(record: EngineRecord, request: t.PrepareRequest) -> None:
    if not _takes(record, request.transport):
        able = ", ".join(x.name for x in record.capabilities.transports)
        raise InvalidArgument(
            f"transport = {request.transport.name}: engine {record.engine_id} takes {able}; choose of these"
        )
    if record.home_run not in ("", request.run_id):
        raise FailedPrecondition(
            f"engine_ids: {record.engine_id} is configured for run {record.home_run!r}, not for "
            f"{request.run_id!r}; change its run_id, or leave that empty so that any run may claim it"
        )
