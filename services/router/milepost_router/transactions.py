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
from collections import OrderedDict
from collections.abc import Awaitable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from milepost import types as t
from milepost.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    MilepostError,
    NotFound,
    StaleTerm,
    Unavailable,
)
from milepost.types import EngineState
from milepost_common.telemetry import logs, tracing
from milepost_router import preparing
from milepost_router.engine_api import EngineFault
from milepost_router.fleet import Fleet
from milepost_router.grouping import Grouping
from milepost_router.groups import COLLECTIVE, Group, Groups
from milepost_router.ledger import LEASE_TTL_S, Ledger, Publication, RouterHeld
from milepost_router.member import Member
from milepost_router.metrics import TransactionMeter
from milepost_router.plan import Plan
from milepost_router.probe import ApiOf
from milepost_router.record import EngineRecord
from milepost_router.settings import RouterSettings
from milepost_router.transaction import Transaction

T = TypeVar("T")

REMEMBERED = 64
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
        self._groups = Groups()
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
        preparing.validate(request)
        if self._ledger is None:
            raise FailedPrecondition(
                "this router has no buffer, so there are no weight versions; set [router] buffer",
                reason="NO_LEDGER",
            )
        self.fence(request.run_id, request.term)
        return await self._own(self._prepare_alone(request, self._ledger))

    async def _prepare_alone(self, request: t.PrepareRequest, ledger: Ledger) -> t.Prepared:
        """One preparation of a run at a time; what is open makes room."""
        async with self._locks.setdefault(request.run_id, asyncio.Lock()):
            self.fence(request.run_id, request.term)
            current = self._open.get(request.run_id)
            if current is not None and current.is_answer_to(request):
                return current.prepared
            if current is not None:
                await current.abort(f"term {request.term} prepared attempt {request.attempt}")
            return await self._prepare(request, ledger)

    def fence(self, run_id: str, term: int) -> None:
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
        records = self._of_one_nccl(request, self._members(request))  # the fleet may have changed meanwhile
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
                preparing.require_takes(record, request)
            return [e for e in named if self._fleet.eligible(e, now)]
        needy = [
            e
            for e in self._fleet.of_run(request.run_id)
            if self._fleet.eligible(e, now)
            and preparing.takes(e, request.transport)
            and not preparing.serves(e, request)
        ]
        if request.transport not in COLLECTIVE:
            return needy
        return self._grouping.choose(request.run_id, needy, now=now)

    def _of_one_nccl(self, request: t.PrepareRequest, records: list[EngineRecord]) -> list[EngineRecord]:
        """Those that can share a communicator with rank 0; the others are told why not.

        Raises:
          FailedPrecondition: none can.
        """
        reasons = {e: why for e in records if (why := preparing.other_nccl(e, request))}
        for record, why in reasons.items():
            if record.detail != why:
                log.warning("run %s: %s", request.run_id, why)
                self._fleet.explain(record, why)
        if reasons and len(reasons) == len(records):
            raise FailedPrecondition("; ".join(reasons.values()), reason="NCCL_MISMATCH")
        return [e for e in records if e not in reasons]

    def _make(self, request: t.PrepareRequest, version: int, records: list[EngineRecord]) -> Transaction:
        name = f"{request.run_id}/{request.term}/{version}/{request.attempt}"
        group, replaced = self._group(request, records, name=name)
        timeout_s = min(request.timeout_s or self._settings.transaction_timeout_s, _MAX_TIMEOUT_S)
        plan = Plan(
            transaction_id=name if name not in self._all else f"{name}/{len(self._all)}",
            request=request,
            version=version,
            fleet_epoch=self._fleet.fleet_epoch,
            group=group,
            group_is_open=group is not None and group.name != name,
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
                group_name=plan.group_name,
                rank_offset=rank,
                call_timeout_s=self._settings.engine_call_timeout_s,
                leaves=_left_before(request, replaced, record),
                in_group=plan.group_is_open,
            )
            members.append(member)
            rank += member.ranks
        return Transaction(
            plan,
            members,
            publish=self._publish,
            refused=self._refused,
            committed=self._committed,
            broken=self._broken,
            clock=self.meter.begin(),
        )

    def _group(
        self, request: t.PrepareRequest, records: list[EngineRecord], *, name: str
    ) -> tuple[Group | None, Group | None]:
        """The process group of a transaction, and the one that it puts an end to."""
        if request.transport not in COLLECTIVE:
            return None, None
        group, replaced = self._groups.take(request, records, name=name)
        if group.name != name:
            return group, None
        if unknown := preparing.unknown_nccl(records, request):
            log.warning("the NCCL of %s is not known and taken for the trainer's", ", ".join(unknown))
        for record in self._fleet.of_run(request.run_id):
            if replaced and replaced.has(record) and not group.has(record):
                self._spawn(self._leave(record, replaced.name))
        return group, replaced

    async def _leave(self, record: EngineRecord, group_name: str) -> None:
        try:
            await self._api(record).leave_group(group_name)
        except EngineFault as fault:
            log.info("%s: did not leave a process group that is over: %s", record.engine_id, fault)

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
        self.fence(transaction.plan.request.run_id, term)
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

    def _refused(self, transaction: Transaction, why: str) -> None:
        self._fleet.disown(transaction.plan.request.run_id, transaction.plan.version, why)

    def _committed(self, transaction: Transaction) -> None:
        plan, run_id = transaction.plan, transaction.plan.request.run_id
        log.info(
            "run %s: version %d, label %d (%s), is served",
            run_id,
            plan.version,
            plan.request.label,
            transaction.account,
        )
        self._fleet.outdate(run_id, plan.version)
        records = [m.record for m in transaction.members if not m.failed]
        if plan.group is not None and records:
            if len(records) == len(transaction.members):
                self._groups.keep(run_id, plan.group)
            self._grouping.committed(run_id, records, fleet=self._fleet.of_run(run_id))

    def _broken(self, transaction: Transaction) -> None:
        """A group broke: unless a member is known to have failed, the next ones are to find out who did."""
        records = [m.record for m in transaction.members]
        innocent = (EngineState.SERVING, EngineState.STALE)
        if all(m.record.state in innocent or (m.stuck and not m.gone) for m in transaction.members):
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


def _left_before(request: t.PrepareRequest, replaced: Group | None, record: EngineRecord) -> str:
    """The group that a member leaves before it joins another: also that of a router that is gone."""
    if request.transport not in COLLECTIVE:
        return ""
    if replaced is None:
        return request.group_name
    return replaced.name if replaced.has(record) else ""


def about(transaction: Transaction) -> AbstractContextManager[None]:
    """Binds what log lines of a block are about."""
    plan = transaction.plan
    return logs.about(run=plan.request.run_id, version=plan.version, step=plan.request.label)
