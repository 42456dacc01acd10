"""Spans of a step and of its groups: linked both ways, and what becomes of groups that are left out."""

from __future__ import annotations

import pytest
from opentelemetry import trace

from milepost import tracing as client
from milepost.types import StepGroup
from milepost_common.telemetry import tracing
from milepost_trainer.spans import tracing_step
from spans import recording

ROLLOUTS = [f"00-0af7651916cd43dd8448eb211c8031{i}c-b7ad6b7169203331-01" for i in range(3)]


def groups(*traceparents: str) -> list[StepGroup]:
    """A group for each, called a, b, c."""
    return [
        StepGroup(prompt_id="abc"[i], position=i, attempt=1, staleness=i, traceparent=traceparent)
        for i, traceparent in enumerate(traceparents)
    ]


def test_a_step_is_linked_to_its_traced_groups_and_each_of_them_to_it() -> None:
    with recording(0.0) as finished:  # traced for its groups' sake
        with tracing_step("r", step=4, groups=groups(ROLLOUTS[0], "", ROLLOUTS[2]), replayed=False) as step:
            assert tracing.trace_id()
            step.committed({"c": "its payload cannot be read"})
        a, c, whole = finished()
    assert (a.name, c.name, whole.name) == ("trainer.train", "trainer.train", "trainer.step")
    assert [client.traceparent_of(link.context) for link in whole.links] == [ROLLOUTS[0], ROLLOUTS[2]]
    for part, rollout in ((a, ROLLOUTS[0]), (c, ROLLOUTS[2])):
        assert client.traceparent_of(part.parent) == rollout
        assert [link.context.span_id for link in part.links] == [whole.context.span_id]
        assert part.attributes["milepost.step"] == 4
    assert (a.attributes["milepost.outcome"], a.status.status_code) == ("trained", trace.StatusCode.UNSET)
    assert (c.attributes["milepost.outcome"], c.status.description) == (
        "left_out",
        "its payload cannot be read",
    )
    assert whole.attributes["milepost.num_groups"] == 3


def test_a_step_that_was_not_committed_says_no_outcome() -> None:
    with recording() as finished:
        with (
            pytest.raises(RuntimeError),
            tracing_step("r", step=1, groups=groups(ROLLOUTS[0]), replayed=True),
        ):
            raise RuntimeError("a rank died")
        part, whole = finished()
    assert "milepost.outcome" not in part.attributes
    assert whole.status.description == "RuntimeError: a rank died"
    assert whole.attributes["milepost.replayed"] is True


def test_without_traced_groups_the_ratio_decides_and_without_tracing_nothing_is_made() -> None:
    with recording(0.0) as finished:
        with tracing_step("r", step=1, groups=groups("", ""), replayed=False) as step:
            step.committed({})
        assert not finished()
    with tracing_step("r", step=1, groups=groups(ROLLOUTS[0]), replayed=False) as step:
        assert tracing.trace_id() == ""
        step.committed({})
