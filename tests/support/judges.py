"""Judges of a run that is over: its audit, its logs, and its weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from bystander import LATE_S
from chaos import Siege
from milepost.client.weights import WeightClient
from milepost.convert import open_group
from milepost.types import GroupPayload
from weight_proof import TOLERANCE, Forward, Span, spans_of

FETCH_AT_ONCE = 256
WEIGHTS_DIFFER = 1e-3  # the largest change of any weight, of an optimizer with lr 3e-3


async def judge_audit(siege: Siege) -> None:
    """Nothing lost, nothing twice, in Redis and before its witnesses; and no defect in any log."""
    async with siege.stack.buffer() as buffer:
        audit, report = await siege.stack.audited(buffer)
    assert audit.problems == ()
    assert (audit.lost, audit.twice, audit.in_flight) == (0, 0, 0)
    assert audit.accepted == audit.trained
    assert audit.max_staleness_seen <= 2
    assert "acknowledged.jsonl" in report
    assert "steps.jsonl" in report
    assert "lost 0, twice 0" in report
    assert "the audit closes" in report
    assert siege.defects() == []


def judge_deadlines(siege: Siege) -> None:
    """Whoever asked the router was answered by the deadline, or found nobody there."""
    assert siege.bystander
    asked = siege.bystander.asked
    answered = [a for a in asked if a.status]
    ends = Counter(a.status or a.error for a in asked)
    assert ends[200], ends
    assert {a.status for a in answered} <= {200, 502, 503, 504}, ends
    late = [a for a in answered if a.took_s > LATE_S]
    assert not late, f"{len(late)} of {len(asked)} requests were answered late: {late[:5]}"


async def judge_weights(siege: Siege) -> None:
    """No engine served a mixture, or weights under another label than their own.

    The proof proves itself: the same spans under the next label, and under half of each, are found out,
    wherever that step changed the weights.
    """
    spans = await trained_spans(siege)
    forward = Forward(siege.model, siege.checkpoint)
    found = forward.deviations(spans)
    wrong = [(s.prompt_id, s.label, s.start, s.end, d) for s, d in found.items() if d > TOLERANCE]
    assert not wrong, f"{len(wrong)} of {len(spans)} spans differ from their label's weights: {wrong[:5]}"

    newest = max(step for steps in siege.trained().values() for step in steps)
    moved = {label for label in range(newest) if forward.distance(label, label + 1) > WEIGHTS_DIFFER}
    assert len(moved) > newest / 2, f"weights changed in {len(moved)} of {newest} steps: this proves little"
    told = [s for s in spans if s.label in moved]
    late = forward.deviations([replace(s, label=s.label + 1) for s in told])
    mixed = forward.deviations(told, forward.mixture)
    for name, caught in (("the next label", late), ("a mixture", mixed)):
        share = sum(d > TOLERANCE for d in caught.values()) / len(told)
        # Not all: a step may hardly change what a short span is given. A wrong publication has many spans, of
        # which one suffices to be found out above.
        assert share > 0.95, f"only {share:.3f} of the spans are found out under {name}"


async def trained_spans(siege: Siege) -> list[Span]:
    """Every span of every group that was trained."""
    stack, run_id = siege.stack, siege.stack.run_id
    steps = {step: ids for _, by_step in sorted(siege.trained().items()) for step, ids in by_step.items()}
    ids = [prompt_id for step in sorted(steps) for prompt_id in steps[step]]
    payloads: list[GroupPayload] = []
    async with stack.buffer() as buffer, WeightClient(stack.address("buffer")) as weights:
        for start in range(0, len(ids), FETCH_AT_ONCE):
            some = ids[start : start + FETCH_AT_ONCE]
            payloads += [open_group(raw) async for _, raw in buffer.fetch_groups(run_id, prompt_ids=some)]
        used = {span.weight_version for p in payloads for x in p.samples for span in x.version_spans}
        labels = {v: (await weights.get_version(run_id, version=v)).label for v in used}
    assert len(payloads) == len(ids)
    assert all(sample.version_spans_exact for payload in payloads for sample in payload.samples)
    return spans_of(payloads, labels)
