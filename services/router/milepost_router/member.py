"""One engine's part in a weight transaction: the calls, in order, and the way back from each point.

    reserved ── fit, open ──> paused, marked ── take ... ──> touched ── verify, name, resume ── serve ──> done
       │                          │                             │
       └ release                  └ restore: as it was before   └ break_off: STALE, its requests end

From the moment that it is told to enter a collective until it has proven that it came out of it, a member may
hang there, and no call gets SGLang out of it again. Where the transaction fails meanwhile, it is `stuck`:
QUARANTINED until it has been started again, which its launcher does by the router's order.

Where our loader takes all weights by one order, `open` sends nothing: the calls that mark and pause the
engine go with the order (`_opening`), and are done before it on the same connection (ADR 22). If one of them
fails, the order may have been carried out all the same, so the member counts as touched.

A loader that has the layout needs no more than a signal, and is done with it between two of the engine's
steps, so an engine need not be paused for it (`_runs_on`, ADR 25). Such a member is never half written;
should its transaction end without a commit, its requests are taken from it with all that they have. It is
served from before it is named, as any that nobody paused and whose replies we name (`_needs_no_name`).

A call that fails raises EngineFault; the transaction decides what that means for the others. Only `serve`,
`put_back` and `fail` settle the engine in the fleet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from milepost.types import (
    BucketHeader,
    EngineState,
    PauseMode,
    TensorSpec,
    Transport,
    WeightMember,
)
from milepost_router import handles, version_string
from milepost_router.checksums import checksum_of
from milepost_router.engine_api import (
    RESUMING,
    Call,
    EngineApi,
    EngineBroken,
    EngineFault,
    EngineRefused,
    naming,
    pausing,
)
from milepost_router.fleet import Fleet
from milepost_router.groups import COLLECTIVE
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
      leaves: a process group that it is to leave before; empty: none.
      in_group: it is in its group already.
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
        leaves: str = "",
        in_group: bool = False,
    ) -> None:
        self.record, self.rank_offset = record, rank_offset
        self.failed = ""
        self.touched = self.gone = False
        self._fleet, self._api = fleet, api
        self._transaction_id, self._group_name = transaction_id, group_name
        self._leaves, self._in_group = leaves, in_group
        self._entangled = False
        self._call_timeout_s = call_timeout_s
        self._opened = self._session = self._written = self._paused = False
        self._text_before = ""
        self._opening: Sequence[Call] = ()
        self._signal = ""
        self._runs_on: LoadedVersion | None = None

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
    def stuck(self) -> bool:
        """It may hang in a collective, and there is no way out for it; our own engine gets out of any."""
        can_leave = self._ours and not self.record.capabilities.restartable
        return self._entangled and not can_leave

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
            weight_hook=self.record.capabilities.weight_hook,
            instance_id=self.record.instance_id,
        )

    # ------------------------------------------------------------------------------------ forward

    async def join_group(self, group: dict[str, Any], *, timeout_s: float) -> None:
        """Joins the trainer's process group, and leaves the one before."""
        self._entangled = True
        if self._leaves:
            with contextlib.suppress(EngineRefused):
                await self._api.leave_group(self._leaves)
        try:
            await self._api.join_group(group | {"rank_offset": self.rank_offset}, timeout_s=timeout_s)
        except EngineRefused:
            self._entangled = False
            raise
        self._entangled = False

    async def fit(self, manifest: Sequence[TensorSpec]) -> None:
        """Makes sure that the manifest is its model, whole, before its first byte; SGLang cannot be asked."""
        self._require_present()
        if manifest and self._ours:
            await self._api.require_fit(manifest)
        elif self._in_group:
            await self._require_same_life()

    async def _require_same_life(self) -> None:
        """It was not started again unnoticed: SGLang dies of a group that it is not in."""
        info = await self._api.model_info(timeout_s=self._call_timeout_s)
        carries, known = info.get("weight_version"), self.record.version_string
        if carries != known:
            raise EngineFault(f"{self.engine_id}: it carries {carries!r} instead of {known!r}: it restarted")

    async def open(
        self, mode: PauseMode, order: BucketHeader | None = None, *, unproven: LoadedVersion | None = None
    ) -> None:
        """Pauses it, marks its weights as nobody's, opens its session. No new requests from here on.

        Args:
          mode: how it is paused.
          order: brings all weights at once, between two of its steps. What it is told here then goes with
            the order, and it needs no pause if it has no requests.
          unproven: what it may generate with before anybody has looked at that; None: nothing.
        """
        self._require_present()
        self._text_before = self.record.version_string
        self._opened = True
        together = not (self._group_name or self.record.capabilities.update_session)
        if order is not None and together and self.record.takes_signals:
            self._signal = handles.brought(order, self.engine_id).signal
        busy = self.record.in_flight > 0
        self._runs_on = unproven if busy and self._may_run_on(mode) else None
        self._paused = order is None or (busy and self._runs_on is None)
        self._fleet.begin_update(self.record, now=_now(), runs_on=self._runs_on is not None)
        opening = [naming(version_string.updating(self._transaction_id))]
        if self._paused:
            # Who counts tokens by its string gets it behind its last token. Others end replies under the
            # version that they had, and wait less with the string before.
            opening.insert(0 if self.record.capabilities.version_spans else 1, pausing(PAUSE_MODES[mode]))
        if order is not None and together:
            self._opening = opening  # they go with the order
        else:  # nobody enters a collective before all are paused
            await self._api.in_turn(*opening)
        if self.record.capabilities.update_session:
            await self._open_session()

    def _may_run_on(self, mode: PauseMode) -> bool:
        """It may generate while it is updated, and with what it gets before it is named (ADR 25).

        Its loader does all of a signal or nothing; its tokens are counted by us, not by its string; and it
        keeps no prefixes that would have to be forgotten first.
        """
        spans, prefixes = self.record.capabilities.version_spans, self.record.caches_prefixes
        return bool(self._signal) and mode is PauseMode.IN_PLACE and not (spans or prefixes)

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
        self._entangled = transport in COLLECTIVE
        try:
            if transport in COLLECTIVE and not header.whole:
                await self._api.receive_broadcast(header.tensors, self._group_name, timeout_s=timeout_s)
            elif transport is Transport.DISK:
                (folder, *_) = handles.of_ranks(header, self.engine_id, self.ranks)
                await self._api.load_folder(folder, timeout_s=timeout_s)
            else:
                await self._receive(header, timeout_s=timeout_s)
        except EngineRefused:
            if self._ours:
                self.touched = touched_before  # it checks a bucket whole before it writes any of it
            raise

    async def _receive(self, header: BucketHeader, *, timeout_s: float) -> None:
        """Gives it the handles of a bucket; our loader in it says itself whether all of it is written."""
        load_format = handles.brought(header, self.engine_id).load_format
        texts = handles.of_ranks(header, self.engine_id, self.ranks)
        if not load_format:
            await self._api.receive_handles(texts, timeout_s=timeout_s)
            return
        if self._signal:
            if self._runs_on is not None:
                self._fleet.may_write(self.record, self._runs_on)  # before any token of it can come
            said = await self._api.signal(self._signal, opening=self._opening, timeout_s=timeout_s)
        else:
            said = await self._order(texts, load_format, timeout_s=timeout_s)
        self._entangled = False  # it answers, and does not before its GPU is through
        if said.get("transaction") != self._transaction_id or not said.get("ok"):
            why = said.get("message") or f"it speaks of {said.get('transaction')!r}: it restarted"
            raise EngineBroken(f"{self.engine_id}: its loader of weights failed: {why}")
        self._fleet.takes_signals(self.record, said.get("takes_signals") is True)
        self._written = True

    async def _order(self, texts: Sequence[str], load_format: str, *, timeout_s: float) -> dict[str, Any]:
        """Gives it an order, and whatever is to come before it; returns what its loader reports.

        Asked for when the order begins, the report comes right behind it; too early, it is an older one.
        """
        reporting: asyncio.Task[dict[str, Any]] | None = None

        def begins() -> None:
            nonlocal reporting
            if reporting is None:
                reporting = asyncio.create_task(self._api.hook_report(timeout_s=timeout_s))

        try:
            await self._api.receive_order(
                texts, load_format=load_format, opening=self._opening, begins=begins, timeout_s=timeout_s
            )
            assert reporting is not None
            with contextlib.suppress(EngineFault):
                said = await reporting
                if said.get("transaction") == self._transaction_id:
                    return said
        finally:
            if reporting is not None:
                reporting.cancel()
                await asyncio.gather(reporting, return_exceptions=True)
        return await self._api.hook_report(timeout_s=self._call_timeout_s)

    async def verify(self, last_tensor: str, *, with_checksum: bool) -> str:
        """Closes its session, waits until its weights are written, and returns their checksum, if it has one.

        Its mark must still stand: a process that came up again in the meantime has lost it.
        """
        self._require_present()
        if self._session:
            await self._api.end_update()
            self._session = False
        if self._written and not with_checksum:
            return ""  # by the process that has the mark: its report named the transaction
        mark = version_string.updating(self._transaction_id)
        carries = (await self._api.model_info(timeout_s=self._call_timeout_s)).get("weight_version")
        if carries != mark:
            raise EngineFault(f"{self.engine_id}: it carries {carries!r} instead of {mark!r}: it restarted")
        checksum = ""
        if self.record.capabilities.checksum and (with_checksum or not self._ours):
            checksum = checksum_of(await self._api.checksum())  # SGLang synchronises here for every model
        elif last_tensor:
            await self._api.read_back(last_tensor)
        self._entangled = False
        return checksum if with_checksum else ""

    @property
    def _needs_no_name(self) -> bool:
        """It generates, stays, and nobody but us says with what: its string is for the next router."""
        spans, prefixes = self.record.capabilities.version_spans, self.record.caches_prefixes
        return not (self._paused or spans or prefixes or self.record.leaving)

    def serve_unnamed(self) -> None:
        """Requests may come already where its name can follow. `serve` is due all the same."""
        if self.present and self._needs_no_name and not self.record.awaits_name:
            self._fleet.serve_unnamed(self.record, now=_now())

    async def go_on(self, loaded: LoadedVersion, *, being_named: Callable[[], None]) -> None:
        """Names its complete weights, forgets prefixes cached under the old ones, and lets it generate.

        Args:
          loaded: what it holds.
          being_named: called when its name alone is about to be sent: so no request that comes from then on
            has it wait.
        """
        self._require_present()
        self._fleet.loaded_version(self.record, loaded)  # before any token of it can come
        text = str(loaded)
        if self.record.caches_prefixes:
            await _both(self._api.set_version(text), self._forget_prefixes())
            if self._paused:
                await self._api.resume()
        elif self._paused:
            await self._api.in_turn(naming(text), RESUMING)
        else:  # told to flush, SGLang would hand its allocator's memory back to the driver, which takes time
            await self._api.set_version(text, begins=being_named)
        self._require_present()

    async def _forget_prefixes(self) -> None:
        try:
            await self._api.flush_cache()
        except EngineRefused as refusal:  # in_place: running requests keep their cache by choice
            log.debug("%s: cache not flushed: %s", self.engine_id, refusal)

    async def unname(self) -> None:
        """Takes the name back: the ledger refused it."""
        await self._api.set_version(version_string.updating(self._transaction_id))

    def serve(self) -> None:
        """Requests may come, if they did not before: it is out of the transaction."""
        self._fleet.finish_update(self.record, now=_now())

    # ------------------------------------------------------------------------------------ back

    async def put_back(self, why: str) -> None:
        """Takes it out of the transaction: as it was where it was not touched, else STALE.

        Raises:
          EngineFault: it did not follow; it is unsettled.
        """
        if self.stuck:
            self.fail(why)
            return
        if self._group_name:
            with contextlib.suppress(EngineRefused):
                await self._api.leave_group(self._group_name)
        if not self._opened:
            if self.record.transaction == self._transaction_id:
                self._fleet.release(self.record)
            return
        await self._leave_session()
        self._withdraw()
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

    def _withdraw(self) -> None:
        """Takes its requests from it, if they may have tokens of what it was to get."""
        if self._runs_on is not None and self.touched:
            self._fleet.withdraw(self.record)

    def fail(self, why: str) -> None:
        """It failed: QUARANTINED, and its requests go elsewhere."""
        if self.stuck:
            why = f"{self.engine_id} hangs in a broken process group and must be started again: {why}"
        self.failed = self.failed or why
        log.warning("transaction %s: %s", self._transaction_id, why)
        if not self.present:
            return
        if self.record.state in (EngineState.STALE, EngineState.SERVING, EngineState.UPDATING):
            self._withdraw()  # also where it drains, and is not QUARANTINED
            self._fleet.quarantine(self.record, why, now=_now(), restart=self.stuck)
        else:
            self._fleet.release(self.record)

    async def clean_up(self) -> None:
        """After a failure: frees whoever still waits on it, as far as it answers.

        No transaction has it meanwhile: a `resume` of ours must not end the pause of the next one. One that
        is stuck is left alone: it could not end a call.
        """
        if self.stuck:
            return
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
        """After a commit that not everybody reached: the group is over."""
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


async def _both(*calls: Awaitable[None]) -> None:
    """Calls whose order does not matter; waits for all, and raises what the first of them raised."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def _now() -> float:
    return asyncio.get_running_loop().time()
