"""One weight transaction: all members get one version, or nobody serves it.

    PREPARED ── first bucket ──> TRANSFERRING ── commit ──> COMMITTING ── published ──> COMMITTED
       │ members serve on            │ members paused           │ refused by the ledger, nobody left
       └────────── abort ────────────┴───────────┬──────────────┘
                                                 v
                                              ABORTED   untouched members are as before, touched ones STALE

What ends it without a commit: AbortWeights, the trainer's stream breaking, its deadline, a newer term, the
router's stop. All of them call `abort`, which interrupts a bucket under way and is idempotent, like `commit`.

A member that fails is QUARANTINED alone and the others go on, where each has its own bytes (shm, disk).
Where a collective carries them (gloo, nccl), one failure breaks the group for all: members whose process is
gone are QUARANTINED, the others leave it or are started again (see `member`), and the trainer begins the next
attempt with those that are left (see `grouping`). A group that gave everybody the weights is kept for the
next transaction (see `groups`).

Order at the commit (ADR 20): sessions closed, weights read back (a synchronising call), checksums equal
between engines of one layout; then, beside one another, the version is published in the ledger, and each
engine is given its version string, resumed and served from. The commit is over when both are. While the
ledger is away only the publication waits; where it refuses, whoever serves the version already is withdrawn,
requests and all. Some engines are not paused at all and generate with their new weights before; they are
served from beside their naming, too (ADR 25, 26).

State belongs to the transaction and is changed under its lock; members settle their engines in the fleet.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from milepost import types as t
from milepost.errors import DataLoss, FailedPrecondition, InvalidArgument, MilepostError, StaleEpoch
from milepost.types import Transport
from milepost_router import handles
from milepost_router.checksums import odd_ones
from milepost_router.engine_api import EngineFault, EngineRefused
from milepost_router.member import Member
from milepost_router.metrics import TransactionClock
from milepost_router.plan import Phase, Plan
from milepost_router.together import Call, call_all

log = logging.getLogger(__name__)

Publish = Callable[["Transaction", tuple[str, ...]], Awaitable[bool]]
Tell = Callable[["Transaction"], None]
Refused = Callable[["Transaction", str], None]


class Transaction:
    """The state machine.

    Args:
      plan: what was prepared.
      members: who takes part.
      publish: publishes the version in the ledger; False: the ledger is away.
      refused: called when the ledger refuses it: who serves it must not go on.
      committed: called once at the commit.
      broken: called when the process group broke, after its members were put back.
      clock: told of its phases.
    """

    def __init__(
        self,
        plan: Plan,
        members: Sequence[Member],
        *,
        publish: Publish,
        refused: Refused,
        committed: Tell,
        broken: Tell,
        clock: TransactionClock,
    ) -> None:
        self.plan, self.members = plan, tuple(members)
        self.phase = Phase.PREPARED
        self.ended = asyncio.Event()
        self.num_buckets = 0
        self.why_aborted = ""
        self._in_flight = 0
        self._publish, self._on_refused, self._refusal = publish, refused, ""
        self._on_committed, self._on_broken, self._clock = committed, broken, clock
        self._sent: set[str] = set()
        self._lock = asyncio.Lock()
        self._work: asyncio.Task[Any] | None = None
        self._joining: asyncio.Task[None] | None = None
        self._cleaning: set[asyncio.Task[None]] = set()
        self._outcome: t.Committed | None = None
        self._stale: tuple[str, ...] = ()

    # ------------------------------------------------------------------------------------ reading

    @property
    def prepared(self) -> t.Prepared:
        """The answer to its preparation."""
        return t.Prepared(
            transaction_id=self.plan.transaction_id,
            version=self.plan.version,
            fleet_epoch=self.plan.fleet_epoch,
            members=tuple(m.describe() for m in self.members),
            group_name=self.plan.group_name,
            world_size=1 + sum(m.ranks for m in self.members) if self.plan.collective else 0,
        )

    @property
    def account(self) -> str:
        """Where its time went, and how many requests its members had when they were told, for the log."""
        return f"{self._clock.in_words()}; {self._in_flight} requests were in flight"

    @property
    def is_open(self) -> bool:
        """It can still be committed."""
        return self.phase in (Phase.PREPARED, Phase.TRANSFERRING, Phase.COMMITTING)

    def is_answer_to(self, request: t.PrepareRequest) -> bool:
        """It is what the same prepare made before, whose answer was lost."""
        fresh = self.is_open and self.num_buckets == 0 and not self.why_aborted
        return fresh and self.plan.request == request

    @property
    def is_transferred(self) -> bool:
        """Every tensor of its manifest was taken; a folder without a list of tensors is all of them."""
        whole_folder = self.plan.request.transport is Transport.DISK and not self._sent
        return self.num_buckets > 0 and (whole_folder or self._sent >= set(self.plan.manifest))

    @property
    def _live(self) -> list[Member]:
        return [m for m in self.members if not m.failed]

    def _remaining_s(self) -> float:
        return max(0.05, self.plan.expires_at - asyncio.get_running_loop().time())

    # ------------------------------------------------------------------------------------ prepare

    def open_group(self) -> None:
        """Lets every member join the trainer's process group, in the background, unless it is there."""
        if self.plan.group_is_open:
            return
        self._joining = asyncio.create_task(self._join(), name=f"join {self.plan.group_name}")

    async def _join(self) -> None:
        request = self.plan.request
        group = {
            "master_address": request.master_address,
            "master_port": request.master_port,
            "world_size": self.prepared.world_size,
            "group_name": self.plan.group_name,
            "backend": "gloo" if request.transport is Transport.GLOO else "nccl",
        }
        timeout_s = min(self.plan.join_timeout_s, self._remaining_s())
        faults = await self._each(self._live, lambda m: m.join_group(group, timeout_s=timeout_s))
        for member, fault in faults.items():
            member.failed = str(fault)

    # ------------------------------------------------------------------------------------ buckets

    async def take(self, header: t.BucketHeader) -> t.BucketAck:
        """Gives one bucket to every member.

        Raises:
          StaleEpoch: the header belongs to another fleet epoch.
          InvalidArgument: it does not continue or does not fit the manifest.
          FailedPrecondition: the transaction is over.
        """
        async with self._lock:
            self._require_open(header.fleet_epoch)
            self._check(header)
            work = asyncio.create_task(self._transfer(header), name=f"bucket {header.bucket_index}")
            self._work = work
            try:
                await asyncio.wait([work])
            finally:
                self._work = None
                work.cancel()
            if work.cancelled():
                raise self._over()
            broken = work.result()
            self.num_buckets += 1
            self._sent.update(self.plan.manifest if header.whole else [spec.name for spec in header.tensors])
            self._clock.took(header.size_bytes)
            ack = self._acknowledge(header.bucket_index, broken)
            if broken:
                await self._put_back_all("its process group broke: " + "; ".join(broken))
                self._on_broken(self)
            elif not self._live:
                await self._put_back_all("no member is left")
            return ack

    async def _transfer(self, header: t.BucketHeader) -> list[str]:
        """Moves one bucket; returns why the group is broken, where one is."""
        first = self.phase is Phase.PREPARED
        if first:
            by_hook = header.whole and all(each.load_format for each in header.handles)
            on_disk = self.plan.request.transport is Transport.DISK
            broken = await self._open_members(header if by_hook and not on_disk else None)
            if broken:
                return broken
            self._clock.enter("transfer")
        timeout_s = min(self.plan.bucket_timeout_s, self._remaining_s())
        transport = self.plan.request.transport
        faults = await self._each(
            self._live,
            lambda m: m.take(header, transport, timeout_s=timeout_s),
            straggler_s=self.plan.straggler_s,
        )
        return await self._judge(faults, first=first)

    async def _open_members(self, order: t.BucketHeader | None) -> list[str]:
        if self._joining is not None:
            await self._joining
        not_joined = [m.failed for m in self.members if m.failed]
        if not_joined:
            return not_joined
        faults = await self._each(self._live, lambda m: m.fit(self.plan.request.manifest))
        broken = await self._judge(faults, first=True)
        if broken:
            return broken
        self.phase = Phase.TRANSFERRING
        self._clock.enter("pause")
        self._in_flight = sum(member.record.in_flight for member in self._live)
        mode = self.plan.request.pause_mode
        unproven = None if self.plan.verify_checksum else self.plan.loaded
        faults = await self._each(self._live, lambda m: m.open(mode, order, unproven=unproven))
        return await self._judge(faults, first=False)

    async def _judge(self, faults: dict[Member, EngineFault], *, first: bool) -> list[str]:
        """What failures of a step mean; returns why the group is broken."""
        if not faults:
            return []
        if self.plan.collective:
            for member, fault in faults.items():
                member.failed = str(fault)
            return [str(fault) for fault in faults.values()]
        for member, fault in faults.items():
            if first and isinstance(fault, EngineRefused) and not member.touched:
                await self._dismiss(member, str(fault))
            else:
                self._quarantine(member, str(fault))
        return []

    async def _dismiss(self, member: Member, why: str) -> None:
        """It refused the manifest, or the first bucket whole: it goes on with what it had."""
        member.failed = why
        try:
            await member.put_back(f"refused the new weights and keeps what it has: {why}")
        except EngineFault as fault:
            self._quarantine(member, str(fault))

    def _quarantine(self, member: Member, why: str) -> None:
        ours = member.present
        member.fail(why)
        if not ours:
            return  # whoever listens there now is another one
        task = asyncio.create_task(member.clean_up(), name=f"clean up {member.engine_id}")
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)

    def _acknowledge(self, bucket_index: int, broken: list[str]) -> t.BucketAck:
        acks = tuple(
            t.EngineAck(engine_id=m.engine_id, ok=not m.failed, message=m.failed) for m in self.members
        )
        return t.BucketAck(bucket_index=bucket_index, acks=acks, group_broken=bool(broken))

    def _check(self, header: t.BucketHeader) -> None:
        """Refuses a header that does not continue the transaction, before any engine hears of it."""
        where = f"bucket_index = {header.bucket_index}"
        if header.bucket_index != self.num_buckets:
            raise InvalidArgument(f"{where}: bucket {self.num_buckets} comes next; send buckets without gaps")
        for spec in header.tensors:
            if spec != self.plan.manifest.get(spec.name):
                promised = self.plan.manifest.get(spec.name)
                raise InvalidArgument(
                    f"{where}: tensor {spec.name!r} as {spec.dtype} {list(spec.shape)} is not in the "
                    f"manifest ({_spec(promised)}); send what was prepared"
                )
            if spec.name in self._sent:
                raise InvalidArgument(f"{where}: tensor {spec.name!r} was sent already; send each once")
        if header.whole and (self.num_buckets or header.tensors):
            raise InvalidArgument(f"{where}: whole = true: send one bucket alone, and name no tensors in it")
        if header.whole or not self.plan.collective:
            for member in self._live:
                handles.of_ranks(header, member.engine_id, member.ranks)
        elif not header.tensors:
            raise InvalidArgument(f"{where}: tensors is empty; name what is broadcast")

    # ------------------------------------------------------------------------------------ commit

    async def commit(self, *, fleet_epoch: int, num_buckets: int) -> t.Committed:
        """Verifies, names, publishes, resumes. Asked again it answers the same.

        Raises:
          StaleEpoch, InvalidArgument: the request does not fit; the transaction stays open.
          FailedPrecondition: it is over, incomplete, or the ledger refuses the version.
          DataLoss: engines of one layout hold different weights.
        """
        async with self._lock:
            if self._outcome is not None:
                return self._outcome
            self._require_open(fleet_epoch)
            self._require_complete(num_buckets)
            self.phase = Phase.COMMITTING
            try:
                return await self._commit()
            except MilepostError as error:
                if not self.ended.is_set():
                    await self._put_back_all(str(error))
                raise

    async def _commit(self) -> t.Committed:
        self._clock.enter("verify")
        sums = await self._verify()
        self._clock.enter("commit")
        going_on = asyncio.create_task(self._step(self._go_on), name="go on")  # first: requests wait for it
        publishing = asyncio.create_task(self._tell_ledger(), name=f"publish {self.plan.version}")
        try:
            await going_on
            self._clock.enter("publish")
            published = await publishing
        except MilepostError:
            await self._each(self._unserved, lambda m: m.unname())
            raise
        finally:
            await _end(going_on, publishing)
        self.phase = Phase.COMMITTED
        self._clock.end("committed")
        self._on_committed(self)
        self._outcome = self._committed(sums, published=published)
        self.ended.set()
        if self.plan.collective and len(self._live) < len(self.members):
            for member in self._live:
                self._in_background(member.leave_group(), f"leave group {member.engine_id}")
        return self._outcome

    async def _tell_ledger(self) -> bool:
        """Publishes the version; a refusal is passed on at once, whatever engines are at."""
        try:
            return await self._publish(self, tuple(m.engine_id for m in self._live))
        except MilepostError as error:
            self._refusal = str(error)
            self._on_refused(self, self._refusal)
            raise

    async def _go_on(self, member: Member) -> None:
        """Names a member's weights and lets it generate; it is served from unless the ledger has refused."""

        def being_named() -> None:
            if not self._refusal:
                member.serve_unnamed()

        await member.go_on(self.plan.loaded, being_named=being_named)
        if not self._refusal:
            member.serve()

    @property
    def _unserved(self) -> list[Member]:
        return [m for m in self._live if m.present]

    def _committed(self, sums: dict[Member, str], *, published: bool) -> t.Committed:
        return t.Committed(
            version=self.plan.version,
            serving=tuple(m.engine_id for m in self._live),
            quarantined={m.engine_id: m.failed for m in self.members if m.failed},
            checksums={m.engine_id: sums[m] for m in self._live if sums.get(m)},
            published=published,
        )

    async def _verify(self) -> dict[Member, str]:
        """Reads back every member; those of one layout must agree."""
        last = next(reversed(self.plan.manifest), "")
        sums: dict[Member, str] = {}

        async def verify(member: Member) -> None:
            sums[member] = await member.verify(last, with_checksum=self.plan.verify_checksum)

        await self._step(verify)
        for member, why in odd_ones({m: (m.layout, sums[m]) for m in self._live if sums.get(m)}).items():
            self._quarantine(member, why)
        if not self._live and any(sums.values()):
            raise DataLoss(
                "engines of one layout hold different weights after the transfer: all are given up"
            )
        self._require_members()
        return sums

    async def _step(self, call: Callable[[Member], Awaitable[None]]) -> None:
        """One step of the commit; those who fail it are out."""
        for member, fault in (await self._each(self._live, call)).items():
            self._quarantine(member, str(fault))

    def _require_members(self) -> None:
        if not self._live:
            reasons = "; ".join(m.failed for m in self.members)
            raise FailedPrecondition(f"no member is left: {reasons}", reason="NO_MEMBERS")

    def _require_complete(self, num_buckets: int) -> None:
        if num_buckets != self.num_buckets:
            raise InvalidArgument(f"num_buckets = {num_buckets}, but {self.num_buckets} were taken")
        if not self.is_transferred:
            missing = sorted(set(self.plan.manifest) - self._sent)
            raise FailedPrecondition(
                f"{len(missing)} tensors of the manifest were not sent: {missing[:3]}; send them all",
                reason="INCOMPLETE",
            )

    # ------------------------------------------------------------------------------------ the end

    async def abort(self, why: str) -> tuple[str, ...]:
        """Ends it without publishing, if it is open; returns the engines that are STALE because of it."""
        if self.is_open and self.phase is not Phase.COMMITTING and not self.why_aborted:
            self.why_aborted = why
            if self._work is not None:
                self._work.cancel()
        async with self._lock:
            if self.is_open:
                await self._put_back_all(why)
        return self._stale

    async def settled(self) -> None:
        """Waits until what it left to do in the background is done."""
        while self._cleaning:
            await asyncio.wait(list(self._cleaning))

    async def _put_back_all(self, why: str) -> None:
        """Settles every member that is still in it."""
        self.why_aborted = self.why_aborted or why
        log.warning("transaction %s aborted: %s", self.plan.transaction_id, why)
        if self._joining is not None:
            await self._end_joining(self._joining)
        left = [m for m in self.members if m.present]
        gone = {m: m.failed for m in left if m.failed and m.gone}
        for member, reason in gone.items():
            self._quarantine(member, reason)
        staying = [m for m in left if m not in gone]
        for member, fault in (await self._each(staying, lambda m: m.put_back(why))).items():
            self._quarantine(member, str(fault))
        stale = [m for m in self.members if m.touched and m.record.state is t.EngineState.STALE]
        self._stale = tuple(m.engine_id for m in stale)
        self.phase = Phase.ABORTED
        self._clock.end("aborted")
        self.ended.set()

    async def _end_joining(self, joining: asyncio.Task[None]) -> None:
        """A join over NCCL waits for nobody else, so it is heard out: who is cut off in it is stuck."""
        if self.plan.request.transport is Transport.NCCL:
            await asyncio.wait({joining}, timeout=self.plan.straggler_s)
        joining.cancel()

    # ------------------------------------------------------------------------------------ within

    def _require_open(self, fleet_epoch: int) -> None:
        if not self.is_open or self.why_aborted:
            raise self._over()
        if fleet_epoch != self.plan.fleet_epoch:
            raise StaleEpoch(
                f"fleet_epoch = {fleet_epoch}, but transaction {self.plan.transaction_id} was prepared in "
                f"epoch {self.plan.fleet_epoch}; prepare again"
            )

    def _over(self) -> FailedPrecondition:
        state = "was aborted: " + self.why_aborted if self.phase is not Phase.COMMITTED else "is committed"
        return FailedPrecondition(
            f"transaction {self.plan.transaction_id} {state}; prepare again", reason="TRANSACTION_OVER"
        )

    async def _each(
        self, members: Sequence[Member], call: Call, *, straggler_s: float = math.inf
    ) -> dict[Member, EngineFault]:
        return await call_all(members, call, collective=self.plan.collective, straggler_s=straggler_s)

    def _in_background(self, work: Awaitable[None], name: str) -> None:
        async def run() -> None:
            await work

        task = asyncio.create_task(run(), name=name)
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _spec(spec: t.TensorSpec | None) -> str:
    return "unknown name" if spec is None else f"there it is {spec.dtype} {list(spec.shape)}"
