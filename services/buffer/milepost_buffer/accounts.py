"""Accounts of a run: counts, rows, and the part of the audit that Redis alone can give."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from milepost import errors
from milepost import types as t
from milepost_buffer.runs import pairs
from milepost_buffer.store import Store, prefix_of

PAGE = AUDIT_PAGE = 100
"""Rows that one call visits: two or three milliseconds, for which Redis serves nobody else."""
_COLUMNS = (
    "state", "att", "dig", "seq", "src", "inst", "llab", "fail", "stale", "seal", "lab", "sseq",
    "bytes", "facts", "step", "pos", "age", "bound", "why", "note", "tomb",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OwnAudit:
    """What the ledger says of itself at one instant."""

    report: t.AuditReport
    committed_step: int
    next_version: int


class Accounts:
    """Reads; the only thing they change is that expired leases are reaped."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def stats(self, run_id: str) -> t.RunStats:
        """Counts of one run at one instant."""
        flat, admissible, credits, open_sources, _ = await self._store.call(run_id, "stats")
        return _stats(run_id, pairs(flat), admissible=admissible, credits=credits, open_sources=open_sources)

    async def rows(
        self,
        run_id: str,
        *,
        states: Sequence[t.PromptState] = (),
        prompt_ids: Sequence[str] = (),
        from_step: int = 0,
    ) -> AsyncIterator[list[t.LedgerRow]]:
        """Pages of rows: by step and position first, then in order of acceptance. A page is one instant.

        No row is left out of a run that goes on: what came into a step meanwhile is among the latter.
        """
        wanted = {s for s in states if s != t.PromptState.UNSPECIFIED}

        def keep(row: t.LedgerRow | None) -> bool:
            return row is not None and (not wanted or row.state in wanted) and row.step >= from_step

        if prompt_ids:
            for at in range(0, len(prompt_ids), PAGE):
                page = await self._read(run_id, prompt_ids[at : at + PAGE])
                yield [r for r in page if r is not None and keep(r)]
            return
        flat, _, _ = await self._store.call(run_id, "get")
        last = int(pairs(flat).get("leased", 0))
        async for page in self._by_step(run_id, range(max(1, from_step), last + 1)):
            yield [r for r in page if keep(r)]
        if from_step == 0:
            async for page in self._by_acceptance(run_id):
                yield [r for r in page if keep(r) and not 1 <= r.step <= last]

    async def _by_step(self, run_id: str, steps: Iterable[int]) -> AsyncIterator[list[t.LedgerRow]]:
        for step in steps:
            ids = await self._store.command("LRANGE", f"{prefix_of(run_id)}ids:{step}", 0, -1)
            for at in range(0, len(ids), PAGE):
                rows = await self._read(run_id, [i.decode() for i in ids[at : at + PAGE]])
                yield [r for r in rows if r is not None]

    async def _by_acceptance(self, run_id: str) -> AsyncIterator[list[t.LedgerRow]]:
        after = "-inf"
        while True:
            found = await self._store.command(
                "ZRANGEBYSCORE", prefix_of(run_id) + "index", after, "+inf", "WITHSCORES", "LIMIT", 0, PAGE
            )
            if not found:
                return
            rows = await self._read(run_id, [i.decode() for i, _ in _scored(found)])
            yield [r for r in rows if r is not None]
            after = f"({_scored(found)[-1][1]:.0f}"

    async def _read(self, run_id: str, prompt_ids: Sequence[str]) -> list[t.LedgerRow | None]:
        if not prompt_ids:
            return []
        raw = (await self._store.call(run_id, "rows", *prompt_ids))[0]
        return [_row(name, values) if values else None for name, values in zip(prompt_ids, raw, strict=True)]

    async def steps(self, run_id: str, steps: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Ordered prompt ids of steps; empty where a step was never leased."""
        found: dict[int, tuple[str, ...]] = {}
        for step in steps:
            ids = await self._store.command("LRANGE", f"{prefix_of(run_id)}ids:{step}", 0, -1)
            found[step] = tuple(i.decode() for i in ids)
        return found

    async def unknown(self, run_id: str, prompt_ids: Sequence[str]) -> list[str]:
        """Those of the prompts that have no row."""
        missing: list[str] = []
        for at in range(0, len(prompt_ids), PAGE):
            page = prompt_ids[at : at + PAGE]
            rows = await self._read(run_id, page)
            missing += [name for name, row in zip(page, rows, strict=True) if row is None]
        return missing

    async def own_audit(self, run_id: str) -> OwnAudit:
        """Every row against every count and list, page by page: Redis serves others in between.

        The sums are those of one instant, that of the last page of rows; each row and each place of a step is
        looked at in an instant of its own. One audit of a run goes on at a time.

        Raises:
          Unavailable: another audit of the run is under way; ask again.
        """
        token = uuid.uuid4().hex
        try:
            report = await self._audit_rows(run_id, token)
        except BaseException:
            with contextlib.suppress(errors.MilepostError):
                await self._store.call(run_id, "audit_end", token)
            raise
        twice, problems, committed, version = await self._audit_steps(run_id)
        return OwnAudit(
            report=replace(report, twice=twice, problems=report.problems + tuple(problems)),
            committed_step=committed,
            next_version=version,
        )

    async def _audit_rows(self, run_id: str, token: str) -> t.AuditReport:
        lost, beyond, max_age, problems, done, begins = 0, 0, 0, list[str](), 0, 1
        rest: list[Any] = []
        while not done:
            reply = await self._store.call(run_id, "audit_rows", token, begins, AUDIT_PAGE)
            done, page_lost, page_beyond, page_max_age, page_problems, *rest = reply
            lost, beyond, max_age = lost + page_lost, beyond + page_beyond, max(max_age, page_max_age)
            problems += [p.decode() for p in page_problems]
            begins = 0
        accepted, trained, in_flight, why = rest
        return t.AuditReport(
            accepted=accepted,
            trained=trained,
            dropped={t.DropReason(why[i]).name.lower(): why[i + 1] for i in range(0, len(why), 2)},
            in_flight=in_flight,
            lost=lost,
            problems=tuple(problems),
            beyond_bound=beyond,
            max_staleness_seen=max_age,
        )

    async def _audit_steps(self, run_id: str) -> tuple[int, list[str], int, int]:
        twice, problems, step, position, committed, version = 0, list[str](), 1, 0, 0, 0
        while step:
            reply = await self._store.call(run_id, "audit_steps", step, position, AUDIT_PAGE)
            step, position, page_twice, page_problems, committed, version = reply
            twice += page_twice
            problems += [p.decode() for p in page_problems]
        return twice, problems, committed, version


def _scored(found: Sequence[Any]) -> list[tuple[bytes, float]]:
    return [(found[i], float(found[i + 1])) for i in range(0, len(found), 2)]


def _row(prompt_id: str, values: Sequence[bytes | None]) -> t.LedgerRow:
    v: dict[str, bytes | None] = dict(zip(_COLUMNS, values, strict=True))

    def number(name: str) -> int:
        return int(v[name] or 0)

    def text(name: str) -> str:
        return (v[name] or b"").decode()

    return t.LedgerRow(
        prompt_id=prompt_id,
        state=t.PromptState(number("state")),
        attempt=number("att"),
        step=number("step"),
        position=number("pos"),
        staleness=number("age"),
        max_staleness=number("bound"),
        drop_reason=t.DropReason(number("why")),
        detail=text("note"),
        label=None if v["lab"] is None else number("lab"),
        stale_count=number("stale"),
        failed_attempts=number("fail"),
        source_id=text("src"),
        tombstone=bool(number("tomb")),
    )


def _stats(
    run_id: str, fields: Mapping[str, str], *, admissible: int, credits: int, open_sources: int
) -> t.RunStats:
    def number(name: str) -> int:
        return int(fields.get(name, 0))

    dropped = {
        t.DropReason(int(name[8:])).name.lower(): int(value)
        for name, value in fields.items()
        if name.startswith("dropped:") and int(value)
    }
    return t.RunStats(
        run_id=run_id,
        accepted=number("accepted"),
        waiting=number("waiting"),
        rolling=number("rolling"),
        ready=number("ready"),
        assigned=number("assigned"),
        trained=number("trained"),
        dropped=dropped,
        admissible=admissible,
        credits=credits,
        payload_bytes=number("payload_bytes"),
        max_payload_bytes=number("max_payload_bytes"),
        committed_step=number("committed"),
        leased_step=number("leased"),
        weight_version=number("pub_version"),
        weight_label=number("pub_label"),
        trimmed_step=number("trimmed"),
        open_sources=open_sources,
        waiting_for=_waiting_for(fields, admissible, open_sources),
        max_staleness_seen=number("max_age"),
        term=number("term"),
        expired_leases=number("expired"),
        stale_requeues=number("stale_requeues"),
    )


def _waiting_for(fields: Mapping[str, str], admissible: int, open_sources: int) -> str:
    def number(name: str) -> int:
        return int(fields.get(name, 0))

    if number("term") == 0:
        return "everybody waits for a trainer"
    if number("pub_version") == 0:
        return "gateways wait for the first publication"
    if number("leased") > number("committed"):
        return "the trainer is training"
    if number("ready") >= number("groups_per_step"):
        return "gateways wait for the trainer to take a step"
    if number("rolling"):
        return "the trainer waits for rollouts"
    if number("waiting"):
        return (
            "the trainer waits for a gateway"
            if admissible
            else "the trainer waits for room: checkpoint and trim"
        )
    return "the trainer waits for prompts" if open_sources else "no source is open"
