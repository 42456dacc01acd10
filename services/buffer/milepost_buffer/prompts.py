"""Prompts on their way to a sealed group: sources, leases, seals. WAITING -> ROLLING -> READY, or DROPPED.

Prompt contents and payloads are opaque bytes here. Facts about groups travel through the ledger as JSON
`[num_tokens, rewards, num_loss_tokens, traceparent]`, written at the seal and read by the consumer; the last
is left out where the group is not traced.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from milepost import errors
from milepost import types as t
from milepost_buffer import checks
from milepost_buffer.metrics import PUTS_REFUSED, SEALED_BYTES, SEALS
from milepost_buffer.store import Arg, Store
from milepost_buffer.wake import Answer, Bell
from milepost_common.metrics import Counter

MAX_BATCH = 1024
MAX_GROUPS = 256
MAX_GROUPS_BYTES = 15 * 1024 * 1024
HASH_INLINE_BYTES = 1024 * 1024
CREDIT_RETRY_S = 1.0
_FACTS = json.JSONEncoder(separators=(",", ":"))

_BLOCKED = {
    "CREDITS": "no credits: as many prompts wait as may; put them again when rollouts have taken some",
    "BYTES": "payloads hold 0.8 of max_payload_bytes; the trainer must checkpoint and trim first",
}


@dataclass(frozen=True, kw_only=True)
class StoredPrompt:
    """A prompt as the ledger keeps it: canonical bytes and their digest."""

    prompt_id: str
    content: bytes
    digest: bytes
    cursor: str = ""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A claim on a prompt; `content` is what was put."""

    prompt_id: str
    content: bytes
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Leases:
    """The claims of one call, and what holds for all of them."""

    leases: tuple[Lease, ...] = ()
    reason: str = ""
    min_version: int = 0
    label: int = 0
    ttl_s: float = 0.0
    num_samples: int = 0


class Prompts:
    """What prompt clients and gateways do.

    Attributes:
      seals, sealed_bytes, refused: groups by answer, their payloads, and puts that were sent away.
    """

    def __init__(self, store: Store, bell: Bell) -> None:
        self._store, self._bell = store, bell
        self.seals, self.sealed_bytes = Counter(SEALS), Counter(SEALED_BYTES)
        self.refused = Counter(PUTS_REFUSED)
        for status in t.SealStatus:
            if status:
                self.seals.cell(status.name.lower())
        for what in _BLOCKED:
            self.refused.cell(f"no_{what.lower()}")

    # ------------------------------------------------------------------ sources

    async def open_source(self, run_id: str, *, source_id: str, digest: str = "") -> t.SourcePosition:
        """Opens a source, or reads where it stands. Another digest: FailedPrecondition."""
        checks.check_name("source_id", source_id, longest=256)
        cursor, credits, closed = await self._store.call(run_id, "open_source", source_id, digest)
        return t.SourcePosition(cursor=cursor.decode(), credits=credits, closed=bool(closed))

    async def close_source(self, run_id: str, *, source_id: str) -> int:
        """Closes a source; returns how many are still open."""
        checks.check_name("source_id", source_id, longest=256)
        return (await self._store.call(run_id, "close_source", source_id))[0]

    async def put(
        self,
        run_id: str,
        *,
        prompts: Sequence[StoredPrompt],
        source_id: str = "",
        expected_cursor: str = "",
        max_wait_s: float = 0.0,
    ) -> t.PutPromptsResult:
        """Accepts a prefix of the batch.

        Raises:
          ResourceExhausted: not even the first could be accepted within `max_wait_s`.
          AlreadyExists: the first is in the ledger with other content.
          FailedPrecondition: the stored cursor is not `expected_cursor`.
        """
        checks.check_count("items", len(prompts), most=MAX_BATCH)
        args: list[Arg] = [source_id, expected_cursor, len(prompts)]
        for p in prompts:
            args += (p.prompt_id, p.digest, p.content, p.cursor)

        async def ask() -> Answer[tuple[t.PutPromptsResult, str]]:
            accepted, duplicates, credits, cursor, blocked = await self._store.call(run_id, "put", *args)
            result = t.PutPromptsResult(
                accepted=accepted, duplicates=duplicates, credits=credits, cursor=cursor.decode()
            )
            waits = ("feeder", blocked.decode().lower() or "credits")
            return Answer((result, blocked.decode()), accepted > 0, waits=waits)

        result, blocked = await self._bell.wait_for(run_id, "c", ask, max_wait_s=max_wait_s)
        if result.accepted == 0:
            self.refused.add(f"no_{blocked.lower()}")
            raise errors.ResourceExhausted(
                f"items: {_BLOCKED[blocked]}",
                reason=f"NO_{blocked}",
                metadata={"credits": str(result.credits), "cursor": result.cursor},
                retry_after_s=CREDIT_RETRY_S,
            )
        return result

    async def cancel(self, run_id: str, *, prompt_ids: Sequence[str]) -> t.CancelResult:
        """Drops those that are not in a step yet."""
        checks.check_count("prompt_ids", len(prompt_ids), most=MAX_BATCH)
        yes, no = await self._store.call(run_id, "cancel", *prompt_ids)
        return t.CancelResult(
            cancelled=tuple(x.decode() for x in yes), not_cancelled=tuple(x.decode() for x in no)
        )

    # ------------------------------------------------------------------ leases

    async def lease(
        self, run_id: str, *, gateway_id: str, instance_id: str, max_prompts: int, max_wait_s: float = 0.0
    ) -> Leases:
        """Claims as many prompts as admission allows; waits for the first one."""
        checks.check_name("gateway_id", gateway_id)
        checks.check_name("instance_id", instance_id)
        checks.check_count("max_prompts", max_prompts, most=MAX_BATCH)

        async def ask() -> Answer[Leases]:
            reason, next_ms, version, label, ttl_ms, samples, flat = await self._store.call(
                run_id, "lease", gateway_id, instance_id, max_prompts
            )
            leases = tuple(
                Lease(prompt_id=flat[i].decode(), content=flat[i + 1], attempt=flat[i + 2])
                for i in range(0, len(flat), 3)
            )
            value = Leases(
                leases=leases,
                reason=reason.decode(),
                min_version=version,
                label=label,
                ttl_s=ttl_ms / 1000,
                num_samples=samples,
            )
            next_s = next_ms / 1000 if next_ms >= 0 else None
            return Answer(value, bool(leases), next_s, waits=("gateway", value.reason or "prompts"))

        return await self._bell.wait_for(run_id, "p", ask, max_wait_s=max_wait_s)

    async def renew(
        self, run_id: str, *, instance_id: str, leases: Sequence[t.LeaseKey], names_all: bool = False
    ) -> t.RenewedLeases:
        """Extends leases; answers which are lost, and which others there are where these are all."""
        if leases or not names_all:
            checks.check_count("leases", len(leases), most=MAX_BATCH)
        most_unnamed = MAX_BATCH if names_all else 0
        ttl_ms, lost, flat = await self._store.call(
            run_id, "renew", instance_id, most_unnamed, *_keys(leases)
        )
        others = zip(flat[::2], flat[1::2], strict=True)
        return t.RenewedLeases(
            lost=tuple(leases[i] for i in lost),
            ttl_s=ttl_ms / 1000,
            unnamed=tuple(t.LeaseKey(prompt_id=i.decode(), attempt=attempt) for i, attempt in others),
        )

    async def release(
        self,
        run_id: str,
        *,
        instance_id: str,
        leases: Sequence[t.LeaseKey],
        drop_reason: t.DropReason = t.DropReason.UNSPECIFIED,
        detail: str = "",
        failed: bool = False,
        exhausted_reason: t.DropReason = t.DropReason.UNSPECIFIED,
    ) -> t.ReleaseResult:
        """Gives leases back, or drops their prompts."""
        checks.check_count("leases", len(leases), most=MAX_BATCH)
        released, dropped = await self._store.call(
            run_id,
            "release",
            instance_id,
            int(drop_reason),
            detail[:1000],
            int(failed),
            int(exhausted_reason),
            *_keys(leases),
        )
        return t.ReleaseResult(released=released, dropped=dropped)

    # ------------------------------------------------------------------ seals

    async def seal(self, run_id: str, *, groups: Sequence[t.Group]) -> tuple[t.SealResult, ...]:
        """Seals groups, each on its own; one result a group, in order."""
        checks.check_count("groups", len(groups), most=MAX_GROUPS)
        size = sum(len(g.payload) for g in groups)
        if size > MAX_GROUPS_BYTES:
            raise errors.InvalidArgument(
                f"groups: payloads of {size} bytes; put at most {MAX_GROUPS_BYTES} in one call"
            )
        problems = await _problems(groups, size)
        sound = [g for g, problem in zip(groups, problems, strict=True) if problem is None]
        args = [x for group in sound for x in _seal_args(group)]
        payloads = [g.payload for g in sound]
        answers = iter((await self._store.call(run_id, "seal", *args, staged=payloads))[0])
        results = tuple(
            t.SealResult(prompt_id=g.header.prompt_id, status=t.SealStatus.INVALID, message=problem)
            if problem is not None
            else _seal_result(g, next(answers))
            for g, problem in zip(groups, problems, strict=True)
        )
        self._count(groups, results)
        return results

    def _count(self, groups: Sequence[t.Group], results: Sequence[t.SealResult]) -> None:
        for group, result in zip(groups, results, strict=True):
            self.seals.add(_WORDS[result.status])
            if result.status is t.SealStatus.SEALED:
                self.sealed_bytes.add(amount=len(group.payload))


async def _problems(groups: Sequence[t.Group], size_bytes: int) -> list[str | None]:
    if size_bytes <= HASH_INLINE_BYTES:
        return [checks.group_problem(g) for g in groups]
    return await asyncio.to_thread(lambda: [checks.group_problem(g) for g in groups])


def _keys(leases: Sequence[t.LeaseKey]) -> list[Arg]:
    return [x for key in leases for x in (key.prompt_id, key.attempt)]


def _seal_args(group: t.Group) -> tuple[Arg, ...]:
    h = group.header
    return (
        h.prompt_id,
        h.attempt,
        h.digest,
        len(group.payload),
        _FACTS.encode(
            [h.num_tokens, h.rewards, h.num_loss_tokens, *([h.traceparent] if h.traceparent else [])]
        ),
        len(h.num_tokens),
        int(any(o.is_error for o in h.outcomes)),
        " ".join(map(str, h.weight_versions)),
    )


def _seal_result(group: t.Group, answer: Sequence[object]) -> t.SealResult:
    status = t.SealStatus(int(str(answer[0])))
    what, value = (x.decode() if isinstance(x, bytes) else str(x) for x in answer[1:3])
    return t.SealResult(
        prompt_id=group.header.prompt_id, status=status, message=_seal_message(group, status, what, value)
    )


_WORDS = {status: status.name.lower() for status in t.SealStatus}
_BY_STATUS = {
    t.SealStatus.DUPLICATE: "sealed before with this attempt and digest",
    t.SealStatus.CONFLICT: "this attempt was sealed before with another digest; forget the group",
    t.SealStatus.UNKNOWN_PROMPT: "prompt_id is not in the ledger of this run; forget the group",
}
_BY_CAUSE = {
    "attempt": "attempt = {attempt}: the ledger is at attempt {value}; the lease is lost, forget the group",
    "state": "the prompt is {state}; forget the group",
    "place": "the lease expired and its place was given to another prompt; forget the group",
    "samples": "num_tokens has {samples} entries: a group of this run has samples_per_prompt = {value}; "
    "put it with all of them, or release the prompt",
    "bytes": "payload of {size} bytes: at most {value} (max_group_bytes); shorten the samples, or create "
    "the run with "
    "more",
    "outcomes": "outcomes = {outcomes}: failed samples are sealed only with error_policy = mask; release "
    "or drop the "
    "prompt",
    "version": "weight version {value} is not published in the ledger yet; put the group again",
    "void": "weight version {value} was burned by a newer trainer; release the prompt and roll it out again",
}


def _seal_message(group: t.Group, status: t.SealStatus, what: str, value: str) -> str:
    if not what:
        return _BY_STATUS.get(status, "")
    return _BY_CAUSE[what].format(
        value=value,
        state=t.PromptState(int(value)).name if what == "state" else "",
        attempt=group.header.attempt,
        samples=len(group.header.num_tokens),
        size=len(group.payload),
        outcomes=[o.name for o in group.header.outcomes],
    )
