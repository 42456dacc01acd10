"""The audit of a run: Redis by itself, then Redis against witnesses that live outside of it.

What Redis forgets it forgets consistently, so that part one alone stays green; part two is the judge after a
crash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from milepost import types as t
from milepost_buffer.accounts import Accounts

MAX_PROBLEMS = 200


async def audit(accounts: Accounts, run_id: str, *, witnesses: Sequence[t.Witness] = ()) -> t.AuditReport:
    """Audits a run; `problems` is empty when it closes."""
    own = await accounts.own_audit(run_id)
    report = own.report
    for witness in witnesses:
        wanted = sorted({m.step for m in witness.steps})
        held = await accounts.steps(run_id, wanted)
        lost_steps, problems = compare_steps(witness, held, committed_step=own.committed_step)
        missing = await accounts.unknown(run_id, sorted(set(witness.accepted_prompt_ids)))
        problems += [f"{witness.name}: prompt {name} was accepted, the ledger lost it" for name in missing]
        if witness.weight_version >= own.next_version:
            problems.append(
                f"{witness.name}: saw weight version {witness.weight_version}, the ledger would hand out "
                f"{own.next_version} next"
            )
        report = replace(
            report,
            lost=report.lost + lost_steps + len(missing),
            twice=report.twice + len(_trained_twice(witness)),
            problems=report.problems + tuple(problems),
        )
    return replace(report, problems=report.problems[:MAX_PROBLEMS])


def compare_steps(
    witness: t.Witness, held: Mapping[int, Sequence[str]], *, committed_step: int
) -> tuple[int, list[str]]:
    """Steps a witness knows against the ledger's: prompts that the ledger lost, and what differs in words.

    A step above `committed_step` may be rewound (its groups are ASSIGNED, in the same order); one that the
    ledger does not hold at all is lost.
    """
    lost, problems = 0, [f"{witness.name}: prompt {name} stands twice" for name in _trained_twice(witness)]
    for m in witness.steps:
        ids = tuple(held.get(m.step, ()))
        if ids == tuple(m.prompt_ids):
            continue
        gone = set(m.prompt_ids) - set(ids)
        lost += len(gone)
        words = f"{len(gone)} prompts are not in it" if gone else "its order or its size differs"
        where = "committed" if m.step <= committed_step else "not committed"
        problems.append(f"{witness.name}: step {m.step} is not as the ledger has it ({where} there): {words}")
    return lost, problems


def _trained_twice(witness: t.Witness) -> list[str]:
    """Prompts in two different steps of the newest account that a witness has of each step."""
    newest = {m.step: m.prompt_ids for m in witness.steps}
    seen: set[str] = set()
    twice: list[str] = []
    for ids in newest.values():
        for name in ids:
            if name in seen:
                twice.append(name)
            seen.add(name)
    return twice
