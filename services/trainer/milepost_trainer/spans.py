"""Spans of a step: one trace for the step, and a part of it in the trace of each of its groups.

    trainer.step    [ train, commit, publish, save ]  its own trace, linked to the rollouts of its groups
    trainer.train   [ train, commit ]                 one a group, child of its rollout, linked to the step

A step is traced when one of its groups is, or as the ratio wills.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

from milepost import types as t
from milepost_common.telemetry import tracing
from milepost_common.telemetry.tracing import Span


class StepTrace:
    """The spans of one step in the traces of its groups.

    Args:
        parts: prompt_id -> span.
    """

    def __init__(self, parts: Mapping[str, Span]) -> None:
        self._parts = dict(parts)

    def committed(self, left_out: Mapping[str, str]) -> None:
        """The step's groups are TRAINED, but for those that were left out, each with the reason."""
        for prompt_id, span in self._parts.items():
            if why := left_out.get(prompt_id):
                span.fail(why)
            span.set(outcome="left_out" if prompt_id in left_out else "trained")
            span.end()
        self._parts.clear()


@contextmanager
def tracing_step(
    run_id: str, *, step: int, groups: Sequence[t.StepGroup], replayed: bool
) -> Generator[StepTrace]:
    """The span of a step, active while the block runs; what was not committed by then was not trained."""
    if not tracing.on:
        yield StepTrace({})
        return
    rollouts = [group.traceparent for group in groups]
    with tracing.span(
        "trainer.step",
        parent="",
        begins=True,
        links=rollouts,
        run_id=run_id,
        step=step,
        num_groups=len(groups),
        replayed=replayed,
    ) as span:
        parts = {group.prompt_id: _part(run_id, step, group, span) for group in groups}
        try:
            yield StepTrace(parts)
        finally:
            for part in parts.values():
                part.end()


def _part(run_id: str, step: int, group: t.StepGroup, span: Span) -> Span:
    return tracing.span(
        "trainer.train",
        parent=group.traceparent,
        links=[span.traceparent],
        run_id=run_id,
        prompt_id=group.prompt_id,
        attempt=group.attempt,
        step=step,
        position=group.position,
        staleness=group.staleness,
    )
