"""One engine's part in a weight transaction: the calls, in order, and the way back from each point.

    reserved ── fit, open ──> paused, marked ── take ... ──> touched ── verify, name, finish ──> done
       │                          │                             │
       └ release                  └ restore: as it was before   └ break_off: STALE, its requests end

A call that fails raises EngineFault; the transaction decides what that means for the others. Only `finish`,
`put_back` and `fail` change the fleet, and each of them settles the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import orjson

from milepost.errors import InvalidArgument
from milepost.types import BucketHeader, EngineState, PauseMode, TensorSpec, Transport, WeightMember
from milepost_router import version_string
from milepost_router.engine_api import EngineApi, EngineFault, EngineRefused
from milepost_router.fleet import Fleet
from milepost_router.record import EngineRecord
from milepost_router.version_string import LoadedVersion

log = logging.getLogger(__name__)

PAUSE_MODES = {
    PauseMode.UNSPECIFIED: "retract",
    PauseMode.RETRACT: "retract",
    PauseMode.IN_PLACE: "in_place",
    PauseMode.ABORT: "abort",
}
_HERE = (EngineState.STALE, EngineState.SERVING, EngineState.QUARANTINED, EngineState.UPDATING)


class Member:
    """One engine in one transaction.

    Args:
      fleet: owner of the record.
      record: the engine.
      api: its client.
      transaction_id: the transaction.
      group_name: the process group it joins; empty: none.
      rank_offset: its first rank in that group.
      call_timeout_s: deadline of a call that moves no weights.

    Attributes:
      failed: why it is out of the transaction; empty: it takes part.
      touched: bytes of the new version may be in its weights.
      gone: its process did not answer any more.
    """

    def __init__(
        self,
        fleet: Fleet,
        record: EngineRecord,
        api: EngineApi,
        *,
        transaction_id: str,
        group_name: str,
        rank_offset: int,
        call_timeout_s: float,
    ) -> None:
        self.record, self.rank_offset = record, rank_offset
        self.failed = ""
        self.touched = self.gone = False
        self._fleet, self._api = fleet, api
        self._transaction_id, self._group_name = transaction_id, group_name
        self._call_timeout_s = call_timeout_s
        self._opened = self._session = False
        self._text_before = ""

    @property
    def engine_id(self) -> str:
        """Its name."""
        return self.record.engine_id

    @property
    def ranks(self) -> int:
        """Its tensor-parallel ranks."""
        return max(1, self.record.capabilities.tensor_parallel_size)

    @property
    def _ours(self) -> bool:
        """It is the CPU engine, which checks more than SGLang does."""
        return self.record.capabilities.engine.startswith("milepost")

    @property
    def layout(self) -> str:
        """Engines of one layout hash their weights alike."""
        return f"{self.record.capabilities.engine} tp={self.ranks}"

    @property
    def present(self) -> bool:
        """It is still the engine that was reserved."""
        return self.record.state in _HERE and self.record.transaction == self._transaction_id

    def _require_present(self) -> None:
        if not self.present:
            raise EngineFault(f"{self.engine_id}: it left or restarted since the transaction was prepared")

    def describe(self) -> WeightMember:
        """As the contract shows it."""
        return WeightMember(
            engine_id=self.engine_id,
            rank_offset=self.rank_offset,
            tensor_parallel_size=self.ranks,
            gpu_uuids=self.record.capabilities.gpu_uuids,
        )

    # ------------------------------------------------------------------------------------ forward

    async def join_group(self, group: dict[str, Any], *, timeout_s: float) -> None:
        """Joins the trainer's process group."""
        await self._api.join_group(group | {"rank_offset": self.rank_offset}, timeout_s=timeout_s)

    async def fit(self, manifest: Sequence[TensorSpec]) -> None:
        """Makes sure that the manifest is its model, whole, before its first byte; SGLang cannot be asked."""
        self._require_present()
        if manifest and self._ours:
            await self._api.require_fit(manifest)

    async def open(self, mode: PauseMode) -> None:
        """Pauses it, marks its weights as nobody's, opens its session. No new requests from here on."""
        self._require_present()
        self._text_before = self.record.version_string
        self._opened = True
        self._fleet.begin_update(self.record, now=_now())
        await self._api.pause(PAUSE_MODES[mode])
        await self._api.set_version(version_string.updating(self._transaction_id))
        if self.record.capabilities.update_session:
            await self._open_session()

    async def _open_session(self) -> None:
        try:
            await self._api.begin_update()
        except EngineRefused:  # one is open: its owner is gone, for this router has the run
            await self._api.end_update()
            await self._api.begin_update()
        self._session = True

    async def take(self, header: BucketHeader, transport: Transport, *, timeout_s: float) -> None:
        """Gives it one bucket.

        Raises:
          EngineFault: it did not take it; `touched` says whether its weights are still what they were.
        """
        self._require_present()
        touched_before, self.touched = self.touched, True
        try:
            if transport is Transport.GLOO:
                await self._api.receive_broadcast(header.tensors, self._group_name, timeout_s=timeout_s)
            elif transport is Transport.DISK:
                await self._api.load_folder(handles_of(header, self)[0], timeout_s=timeout_s)
            else:
                await self._api.receive_handles(handles_of(header, self), timeout_s=timeout_s)
        except EngineRefused:
            if self._ours:
                self.touched = touched_before  # it checks a bucket whole before it writes any of it
            raise

    async def verify(self, last_tensor: str, *, with_checksum: bool) -> str:
        """Closes its session, waits until its weights are written, and returns their checksum, if it has one.

        Its mark must still stand: a process that came up again in the meantime has lost it.
        """
        self._require_present()
        mark = version_string.updating(self._transaction_id)
        carries = (await self._api.model_info(timeout_s=self._call_timeout_s)).get("weight_version")
        if carries != mark:
            raise EngineFault(f"{self.engine_id}: it carries {carries!r} instead of {mark!r}: it restarted")
        if self._session:
            await self._api.end_update()
            self._session = False
        if self.record.capabilities.checksum and (with_checksum or not self._ours):
            checksum = checksum_of(await self._api.checksum())  # SGLang synchronises here for every model
            return checksum if with_checksum else ""
        if last_tensor:
            await self._api.read_back(last_tensor)
        return ""

    async def name(self, loaded: LoadedVersion) -> None:
        """Gives its complete weights their name."""
        self._require_present()
        await self._api.set_version(str(loaded))
        self._fleet.loaded_version(self.record, loaded)

    async def unname(self) -> None:
        """Takes the name back: the ledger refused it."""
        await self._api.set_version(version_string.updating(self._transaction_id))

    async def finish(self) -> None:
        """Forgets prefixes cached under the old weights and goes on."""
        self._require_present()
        try:
            await self._api.flush_cache()
        except EngineRefused as refusal:  # in_place: running requests keep their cache by choice
            log.debug("%s: cache not flushed: %s", self.engine_id, refusal)
        await self._api.resume()
        self._require_present()
        self._fleet.finish_update(self.record, now=_now())

    # ------------------------------------------------------------------------------------ back

    async def put_back(self, why: str) -> None:
        """Takes it out of the transaction: as it was where it was not touched, else STALE.

        Raises:
          EngineFault: it did not follow; it is unsettled.
        """
        if self._group_name:
            with contextlib.suppress(EngineRefused):
                await self._api.leave_group(self._group_name)
        if not self._opened:
            if self.record.transaction == self._transaction_id:
                self._fleet.release(self.record)
            return
        await self._leave_session()
        if self.touched:
            await self._api.abort_all()
            await self._api.resume()
            text = version_string.updating(self._transaction_id)
            self._settle_stale(why, text)
            return
        await self._api.set_version(self._text_before)
        await self._api.resume()
        if self.present:
            self._fleet.restore(self.record, why, now=_now())

    def _settle_stale(self, why: str, text: str) -> None:
        if self.present:
            self._fleet.break_off(self.record, why, text, now=_now())

    def fail(self, why: str) -> None:
        """It failed: QUARANTINED, and its requests go elsewhere."""
        self.failed = self.failed or why
        log.warning("transaction %s: %s", self._transaction_id, why)
        if not self.present:
            return
        if self.record.state in (EngineState.STALE, EngineState.SERVING, EngineState.UPDATING):
            self._fleet.quarantine(self.record, why, now=_now())
        else:
            self._fleet.release(self.record)

    async def clean_up(self) -> None:
        """After a failure: frees whoever still waits on it, as far as it answers.

        No transaction has it meanwhile: a `resume` of ours must not end the pause of the next one.
        """
        self._fleet.clean(self.record, by=1)
        try:
            for call in (self._leave_group, self._leave_session, self._api.abort_all, self._api.resume):
                with contextlib.suppress(EngineRefused):
                    await call()
        except EngineFault as fault:  # nobody is there, or it is silent: it is given weights before it serves
            log.info("%s: not told that its transaction is over: %s", self.engine_id, fault)
        finally:
            self._fleet.clean(self.record, by=-1)

    async def leave_group(self) -> None:
        """After a commit: the group is over."""
        with contextlib.suppress(EngineFault):
            await self._leave_group()

    async def _leave_group(self) -> None:
        if self._group_name:
            await self._api.leave_group(self._group_name)

    async def _leave_session(self) -> None:
        if self._session:
            self._session = False
            with contextlib.suppress(EngineRefused):
                await self._api.end_update()


def handles_of(header: BucketHeader, member: Member) -> list[str]:
    """The handles of a bucket for one member, one a rank.

    Raises:
      InvalidArgument: there is none for it, or not one a rank.
    """
    own = [h for h in header.handles if h.engine_id == member.engine_id]
    common = [h for h in header.handles if not h.engine_id]
    chosen = (own or common or [None])[0]
    if chosen is None or not chosen.handles:
        raise InvalidArgument(
            f"handles of bucket {header.bucket_index}: none for engine {member.engine_id}; send one with its "
            "engine_id, or one without engine_id for every member"
        )
    if len(chosen.handles) not in (1, member.ranks):
        raise InvalidArgument(
            f"handles of bucket {header.bucket_index} for engine {member.engine_id}: {len(chosen.handles)} "
            f"were sent for {member.ranks} ranks; send one a rank"
        )
    texts = [h.decode() for h in chosen.handles]
    return texts * member.ranks if len(texts) == 1 else texts


def checksum_of(answer: dict[str, Any]) -> str:
    """One checksum from what the weight checker says: its ranks' sums, or the digest of it all."""
    ranks: object = answer.get("ranks")
    if isinstance(ranks, list):
        each = [cast(dict[str, Any], rank) for rank in cast(list[object], ranks) if isinstance(rank, dict)]
        sums = [str(rank.get("per_gpu_checksum", "")) for rank in each]
        if sums and all(sums):
            return ",".join(sums)
    telling = {key: value for key, value in answer.items() if key not in ("success", "message")}
    raw = orjson.dumps(telling, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(raw).hexdigest() if telling else ""


def odd_ones(sums: dict[Member, tuple[str, str]]) -> dict[Member, str]:
    """Members whose checksum differs from most of their layout's; without a majority, all of them."""
    odd: dict[Member, str] = {}
    for layout in {layout for layout, _ in sums.values()}:
        of_layout = {m: s for m, (its, s) in sums.items() if its == layout}
        common, count = Counter(of_layout.values()).most_common(1)[0]
        majority = 2 * count > len(of_layout)
        for member, checksum in of_layout.items():
            if len(set(of_layout.values())) > 1 and not (majority and checksum == common):
                odd[member] = f"{member.engine_id}: checksum {checksum[:16]} differs from others of {layout}"
    return odd


def _now() -> float:
    return asyncio.get_running_loop().time()
