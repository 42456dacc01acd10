"""`milepost ledger`: rows and counts of a run, and its audit by outside witnesses."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from milepost.cli import tables
from milepost.cli.options import PATIENCE, add_address, add_json, add_run, address
from milepost.cli.witness import read_witnesses
from milepost.client.buffer import BufferClient
from milepost.errors import NotFound
from milepost.types import AuditReport, DropReason, LedgerRow, PromptState, RunStats, Witness

_STATES = {s.name.lower(): s for s in PromptState if s}
_MAX_CALL_BYTES = 8 * 1024 * 1024


def add(commands: Any, text: str) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "ledger", help=text, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run(parser)
    add_address(parser, "buffer")
    parser.add_argument(
        "--state", action="append", default=[], choices=_STATES, help="only rows in this state; repeatable"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="ID", help="only this prompt; repeatable"
    )
    parser.add_argument("--from-step", type=int, default=0, metavar="N", help="only steps from this one on")
    parser.add_argument(
        "--limit",
        type=int,
        default=50,
        metavar="N",
        help="rows to show, the last ones; 0: all (default: %(default)s)",
    )
    parser.add_argument("--audit", action="store_true", help="do the sums close? exit status 1 if not")
    parser.add_argument(
        "--witness",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATH",
        help="audit against these files or folders",
    )
    add_json(parser)
    parser.set_defaults(run=ledger)


_DESCRIPTION = """Shows where every prompt of a run stands, and audits it.

Part one of the audit looks at the ledger alone: accepted = trained + dropped + in flight, nothing
lost, nothing twice. Part two compares it with witnesses outside of Redis: manifests in checkpoints,
the trainer's steps.jsonl, and the ids that `milepost feed --acknowledged` wrote. A folder stands
for all of these in it.

exit status: 0 it closes; 1 it does not, or the buffer cannot be asked; 2 wrong command line
"""


async def ledger(options: argparse.Namespace) -> int:
    """Runs the subcommand."""
    witnesses = read_witnesses(options.witness, run_id=options.run_id)
    async with BufferClient(address(options, "buffer"), retry=PATIENCE) as client:
        if options.audit or options.witness:
            report = await audit(client, options.run_id, witnesses)
            print(tables.as_json(report) if options.json else audit_text(options.run_id, report, witnesses))
            return 0 if report.closes else 1
        states = [_STATES[name] for name in options.state]
        rows = [
            row
            async for row in client.get_ledger(
                options.run_id, states=states, prompt_ids=options.prompt, from_step=options.from_step
            )
        ]
        stats = _only(await client.get_stats(options.run_id), options.run_id)
    if options.json:
        print(tables.as_json({"stats": stats, "rows": rows}))
        return 0
    shown = rows[-options.limit :] if options.limit else rows
    print(rows_text(shown))
    if len(shown) < len(rows):
        print(f"... the last {len(shown)} of {len(rows)} rows (--limit 0 shows all)")
    print(stats_text(stats))
    return 0


async def audit(client: BufferClient, run_id: str, witnesses: Sequence[Witness]) -> AuditReport:
    """Audits a run; many witnesses take several calls, and what each finds is put together."""
    report: AuditReport | None = None
    for part in parts_of(witnesses):
        found = await client.audit_ledger(run_id, witnesses=part)
        report = found if report is None else _joined(report, found)
    assert report is not None
    return report


def parts_of(witnesses: Sequence[Witness], *, most_bytes: int = _MAX_CALL_BYTES) -> list[list[Witness]]:
    """Witnesses in portions that fit into one message; at least one portion."""
    parts: list[list[Witness]] = [[]]
    size_bytes = 0
    for piece in (piece for w in witnesses for piece in _pieces(w, most_bytes)):
        piece_bytes = _size_bytes(piece)
        if parts[-1] and size_bytes + piece_bytes > most_bytes:
            parts.append([])
            size_bytes = 0
        parts[-1].append(piece)
        size_bytes += piece_bytes
    return parts


def _pieces(witness: Witness, most_bytes: int) -> list[Witness]:
    if _size_bytes(witness) <= most_bytes:
        return [witness]
    if len(witness.steps) <= 1 and len(witness.accepted_prompt_ids) <= 1:
        return [witness]
    i, j = len(witness.steps) // 2, len(witness.accepted_prompt_ids) // 2
    first = replace(witness, steps=witness.steps[:i], accepted_prompt_ids=witness.accepted_prompt_ids[:j])
    second = replace(witness, steps=witness.steps[i:], accepted_prompt_ids=witness.accepted_prompt_ids[j:])
    return _pieces(first, most_bytes) + _pieces(second, most_bytes)


def _size_bytes(witness: Witness) -> int:
    """An estimate from above for ids of ASCII: each travels with a few bytes around it."""
    ids = [*witness.accepted_prompt_ids, *(p for s in witness.steps for p in s.prompt_ids)]
    ids += [d.prompt_id for s in witness.steps for d in s.dropped]
    return sum(len(i) + 8 for i in ids) + 16 * len(witness.steps) + 64


def _joined(a: AuditReport, b: AuditReport) -> AuditReport:
    """What two parts of one audit found: counts of the later one, every problem once."""
    problems = tuple(dict.fromkeys((*a.problems, *b.problems)))
    return replace(b, problems=problems, lost=max(a.lost, b.lost), twice=max(a.twice, b.twice))


def _only(stats: Sequence[RunStats], run_id: str) -> RunStats:
    if not stats:
        raise NotFound(f"run_id = {run_id}: no such run; the trainer creates it")
    return stats[0]


# ---------------------------------------------------------------------------------------------- text


def rows_text(rows: Sequence[LedgerRow]) -> str:
    """Rows as a table."""
    head = ("step", "pos", "prompt", "state", "attempt", "label", "stale", "remarks")
    return tables.table(head, [_row(r) for r in rows])


def _row(r: LedgerRow) -> tuple[object, ...]:
    placed = r.state in (PromptState.ASSIGNED, PromptState.TRAINED)
    remarks = [r.drop_reason.name.lower()] if r.drop_reason is not DropReason.UNSPECIFIED else []
    remarks += [f"requeued {r.stale_count}x"] if r.stale_count else []
    remarks += [f"failed {r.failed_attempts}x"] if r.failed_attempts else []
    remarks += ["tombstone"] if r.tombstone else []
    remarks += [r.detail] if r.detail else []
    return (
        r.step if placed else "-",
        r.position if placed else "-",
        r.prompt_id,
        r.state.name.lower(),
        r.attempt,
        "-" if r.label is None else r.label,
        f"{r.staleness}/{r.max_staleness}" if placed else "-",
        "; ".join(remarks),
    )


def stats_text(s: RunStats) -> str:
    """Counts in three lines."""
    lines = [
        f"run {s.run_id}: step {s.committed_step} committed, {s.leased_step} leased, {s.trimmed_step} "
        f"trimmed; weights {s.weight_version} of step {s.weight_label}; {s.open_sources} sources open",
        f"accepted {s.accepted}: waiting {s.waiting}, rolling {s.rolling}, ready {s.ready}, "
        f"assigned {s.assigned}, trained {s.trained}, dropped {_reasons(s.dropped)}",
    ]
    return "\n".join([*lines, f"waiting for: {s.waiting_for}"] if s.waiting_for else lines)


def audit_text(run_id: str, r: AuditReport, witnesses: Sequence[Witness]) -> str:
    """The audit, with its verdict in the last line."""
    names = ", ".join(w.name for w in witnesses) or "none outside of Redis"
    open_sum = r.accepted - r.trained - sum(r.dropped.values()) - r.in_flight
    lines = [
        f"audit of run {run_id}; witnesses: {names}",
        f"accepted {r.accepted} = trained {r.trained} + dropped {_reasons(r.dropped)} + "
        f"in flight {r.in_flight}" + (f" + {open_sum} unaccounted for" if open_sum else ""),
        f"lost {r.lost}, twice {r.twice}, beyond the staleness bound {r.beyond_bound}; "
        f"largest staleness trained on: {r.max_staleness_seen}",
        *(f"problem: {p}" for p in r.problems),
        "the audit closes" if r.closes else "the audit DOES NOT CLOSE",
    ]
    return "\n".join(lines)


def _reasons(dropped: Mapping[str, int]) -> str:
    total = sum(dropped.values())
    each = ", ".join(f"{k} {v}" for k, v in sorted(dropped.items()) if v)
    return f"{total} ({each})" if each else str(total)
