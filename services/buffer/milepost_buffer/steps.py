"""Steps: READY -> ASSIGNED -> TRAINED, and back when a consumer resumes from an older checkpoint.

Every mutation carries the consumer's term; the script refuses all but the newest one.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from milepost import errors
from milepost import types as t
from milepost_buffer import checks
from milepost_buffer.store import Arg, Store, prefix_of
from milepost_buffer.wake import Answer, Bell

PUBLISHER = "trainer"
MAX_FETCH = 4096
FETCH_BATCH = 64
FETCH_BATCH_BYTES = 8 * 1024 * 1024
MAX_INLINE_BYTES = 8 * 1024 * 1024


class Steps:
    """What the publisher of a run does to steps."""

    def __init__(self, store: Store, bell: Bell) -> None:
        self._store, self._bell = store, bell
        self._known = _Sizes()

    async def lease(
        self,
        run_id: str,
        *,
        consumer_id: str,
        term: int,
        step: int,
        max_wait_s: float = 0.0,
        inline_bytes: int = 0,
    ) -> t.StepLease:
        """Assigns the groups of a step, all or none; with up to `inline_bytes` of their payloads.

        Raises:
          OutOfRange: nothing will ever come.
          StaleTerm: another consumer took over.
          FailedPrecondition: the step is too far ahead, or no checkpoint was stated.
        """
        _check_consumer(consumer_id)
        _check_number("term", term)
        checks.check_range("step", step, 1, checks.MAX_EXACT)

        async def ask() -> Answer[t.StepLease]:
            reply = await self._store.call(run_id, "lease_step", term, step)
            if reply[0] == 1:
                leased = _leased(reply)
                self._known.learn(run_id, leased.groups)
                return Answer(leased, True)
            next_ms = reply[7]
            next_s = next_ms / 1000 if next_ms >= 0 else None
            return Answer(_pending(reply), False, next_s, waits=("trainer", "groups"))

        lease = await self._bell.wait_for(run_id, "s", ask, max_wait_s=max_wait_s)
        if not inline_bytes or not lease.groups:
            return lease
        return replace(lease, payloads=await self._first_payloads(run_id, lease.groups, inline_bytes))

    async def _first_payloads(
        self, run_id: str, groups: Sequence[t.StepGroup], inline_bytes: int
    ) -> tuple[bytes, ...]:
        """What stands before the first payload that does not fit or is not there any more."""
        left, names = min(inline_bytes, MAX_INLINE_BYTES), list[str]()
        for group in groups:
            if (left := left - group.payload_bytes) < 0:
                break
            names.append(group.prompt_id)
        if not names:
            return ()
        values = await self._values(run_id, names)
        there = values.index(None) if None in values else len(values)
        return tuple(cast(list[bytes], values[:there]))

    async def _values(self, run_id: str, prompt_ids: Sequence[str]) -> list[bytes | None]:
        prefix = prefix_of(run_id) + "g:"
        return await self._store.command("MGET", *[prefix + name for name in prompt_ids])

    async def commit(
        self,
        run_id: str,
        *,
        consumer_id: str,
        term: int,
        step: int,
        prompt_ids: Sequence[str],
        dropped: Sequence[t.DroppedGroup] = (),
    ) -> t.CommitResult:
        """Makes a step TRAINED; repeated with the same arguments it changes nothing."""
        _check_consumer(consumer_id)
        _check_number("term", term)
        checks.check_range("step", step, 1, checks.MAX_EXACT)
        args = [len(prompt_ids), *prompt_ids, *_dropped_args("", prompt_ids, dropped)]
        committed, wanted, repeated = await self._store.call(run_id, "commit", term, step, *args)
        return t.CommitResult(
            committed_step=committed, checkpoint_wanted=bool(wanted), repeated_commit=bool(repeated)
        )

    async def open_term(self, run_id: str, *, consumer_id: str) -> t.ResumePoint:
        """Opens a new term: from now on every older one is refused."""
        _check_consumer(consumer_id)
        return _standing(await self._store.call(run_id, "resume_open"))

    async def state_checkpoint(
        self,
        run_id: str,
        *,
        consumer_id: str,
        term: int,
        checkpoint_step: int,
        manifest: Sequence[t.StepManifest] = (),
        on_gap: t.OnGap = t.OnGap.UNSPECIFIED,
    ) -> t.ResumePoint:
        """Says which checkpoint was loaded: later steps will be leased again, as they were.

        Raises:
          DataLoss: payloads after the checkpoint are gone, or the manifest lacks a step that Redis forgot.
          FailedPrecondition: the manifest tells of another history.
        """
        _check_consumer(consumer_id)
        _check_number("term", term)
        checks.check_range("checkpoint_step", checkpoint_step, 0, checks.MAX_EXACT)
        if twice := checks.first_duplicate([str(m.step) for m in manifest]):
            raise errors.InvalidArgument(f"manifest: step {twice} stands twice; give each step once")
        args: list[Arg] = [term, checkpoint_step, int(on_gap) or int(t.OnGap.FAIL), len(manifest)]
        for m in manifest:
            args += (m.step, len(m.prompt_ids), *m.prompt_ids)
            args += _dropped_args(f"manifest step {m.step}: ", m.prompt_ids, m.dropped)
        return _standing(await self._store.call(run_id, "resume_state", *args))

    async def trim(self, run_id: str, *, consumer_id: str, term: int, step: int) -> t.TrimResult:
        """Frees the payloads of steps up to `step`, in several script calls when they are many."""
        _check_consumer(consumer_id)
        _check_number("term", term)
        checks.check_range("step", step, 0, checks.MAX_EXACT)
        freed = 0
        while True:
            trimmed, now_freed, more = await self._store.call(run_id, "trim", term, step)
            freed += now_freed
            if not more:
                return t.TrimResult(trimmed_step=trimmed, freed=freed)

    async def payloads(self, run_id: str, *, prompt_ids: Sequence[str]) -> AsyncIterator[tuple[str, bytes]]:
        """Payloads in the order asked for; a few MiB of them are in memory at once.

        Raises:
          NotFound: one is trimmed, or was never sealed.
        """
        checks.check_count("prompt_ids", len(prompt_ids), most=MAX_FETCH)
        for names in _batches(prompt_ids, await self._sizes(run_id, prompt_ids)):
            values = await self._values(run_id, names)
            for name, payload in zip(names, values, strict=True):
                if payload is None:
                    raise errors.NotFound(
                        f"prompt_ids: {name!r} has no payload; it is trimmed, dropped, or not sealed yet",
                        reason="NO_PAYLOAD",
                        metadata={"prompt_id": name},
                    )
                yield name, payload

    async def _sizes(self, run_id: str, prompt_ids: Sequence[str]) -> Sequence[int]:
        if known := self._known.of(run_id, prompt_ids):
            return known
        prefix = prefix_of(run_id) + "g:"
        return await self._store.commands([("STRLEN", prefix + name) for name in prompt_ids])


class _Sizes:
    """How large payloads are that were leased of late: a hint, so that fetching them need not ask first.

    A payload does not change while its step stands. Where a hint is wrong after all, more or less is in
    memory at once than meant.
    """

    def __init__(self, most: int = MAX_FETCH) -> None:
        self._most = most
        self._known: OrderedDict[tuple[str, str], int] = OrderedDict()

    def learn(self, run_id: str, groups: Iterable[t.StepGroup]) -> None:
        """Notes the payloads of a step."""
        for group in groups:
            self._known[run_id, group.prompt_id] = group.payload_bytes
        while len(self._known) > self._most:
            self._known.popitem(last=False)

    def of(self, run_id: str, prompt_ids: Sequence[str]) -> list[int] | None:
        """Sizes of payloads, if all of them are known."""
        sizes = [self._known.get((run_id, name)) for name in prompt_ids]
        return None if None in sizes else cast(list[int], sizes)


def _batches(prompt_ids: Sequence[str], sizes: Sequence[int]) -> Iterator[list[str]]:
    """Splits payloads so that what is in memory at once stays below a limit, or is a single one."""
    batch: list[str] = []
    held = 0
    for prompt_id, size in zip(prompt_ids, sizes, strict=True):
        if batch and (held + size > FETCH_BATCH_BYTES or len(batch) == FETCH_BATCH):
            yield batch
            batch, held = [], 0
        batch.append(prompt_id)
        held += size
    if batch:
        yield batch


def _check_consumer(consumer_id: str) -> None:
    if consumer_id != PUBLISHER:
        raise errors.Unimplemented(
            f"consumer_id = {consumer_id!r}: followers are not supported by this build; the publisher is "
            f"{PUBLISHER!r}"
        )


def _check_number(field: str, value: int) -> None:
    checks.check_range(field, value, 1, checks.MAX_EXACT)


def _dropped_args(where: str, prompt_ids: Sequence[str], dropped: Sequence[t.DroppedGroup]) -> list[Arg]:
    known = set(prompt_ids)
    for d in dropped:
        if d.prompt_id not in known:
            raise errors.InvalidArgument(f"{where}dropped: {d.prompt_id!r} is not in the step's prompt_ids")
        if d.reason == t.DropReason.UNSPECIFIED:
            raise errors.InvalidArgument(f"{where}dropped: {d.prompt_id!r} has no reason; say why")
    return [len(dropped), *(x for d in dropped for x in (d.prompt_id, int(d.reason)))]


def _leased(reply: Sequence[Any]) -> t.StepLease:
    _, groups, repeated, bound, label, wanted = reply
    return t.StepLease(
        groups=tuple(_group(position, raw) for position, raw in enumerate(groups)),
        repeated_lease=bool(repeated),
        checkpoint_wanted=bool(wanted),
        max_staleness=bound,
        published_label=label,
    )


def _group(position: int, raw: Sequence[Any]) -> t.StepGroup:
    prompt_id, attempt, facts, age, size = raw
    num_tokens, rewards, num_loss_tokens, *traced = json.loads(facts) if facts else ((), (), 0)
    return t.StepGroup(
        prompt_id=prompt_id.decode(),
        position=position,
        attempt=attempt,
        num_tokens=tuple(num_tokens),
        staleness=age,
        payload_bytes=size,
        rewards=tuple(rewards),
        num_loss_tokens=num_loss_tokens,
        traceparent=traced[0] if traced else "",
    )


def _pending(reply: Sequence[Any]) -> t.StepLease:
    _, why, needed, ready, rolling, waiting, waited, _, wanted, label = reply
    if why == b"older":
        reason = f"{waited} older prompts are waited for; {ready} of {needed} groups ready, {rolling} rolling"
    else:
        reason = f"{ready} of {needed} groups ready; {rolling} rolling, {waiting} waiting"
    pending = t.StepPending(reason=reason, needed=needed, ready=ready, rolling=rolling, waiting=waiting)
    return t.StepLease(pending=pending, checkpoint_wanted=bool(wanted), published_label=label)


def _standing(reply: Sequence[Any]) -> t.ResumePoint:
    term, committed, label, version, trimmed, next_step, poison = reply
    return t.ResumePoint(
        term=term,
        committed_step=committed,
        published_label=None if label < 0 else label,
        published_version=version,
        trimmed_step=trimmed,
        next_step=next_step,
        poison_step=poison,
    )
