"""Nobody trains on what is too old, and a run can always go on: admission in every order of events."""

from __future__ import annotations

from dataclasses import replace

import pytest
from admission_model import Rules, room, room_less_kept_steps, search

SIZES = pytest.mark.parametrize(
    "rules",
    [
        Rules(room, max_staleness=0, groups_per_step=1, last_step=3),
        Rules(room, max_staleness=0, groups_per_step=2, last_step=2),
        Rules(room, max_staleness=1, groups_per_step=1, last_step=2),
        Rules(room, max_staleness=1, groups_per_step=2, last_step=2, gaps=False),
        Rules(room, max_staleness=2, groups_per_step=1, last_step=3, gaps=False),
    ],
    ids=lambda r: (
        f"staleness {r.max_staleness}, {r.groups_per_step} groups, {r.last_step} steps, gaps {r.gaps}"
    ),
)


@SIZES
def test_the_bound_holds_and_every_state_can_go_on(rules):
    found = search(rules)
    assert found.too_stale == []
    assert found.stuck == []
    assert found.states > 500


def test_kept_steps_that_count_as_work_keep_a_gap_open_for_ever():
    rules = Rules(room_less_kept_steps, max_staleness=0, groups_per_step=1, last_step=3)
    assert any(state.leased and state.step not in state.leased for state in search(rules).stuck)
    assert search(replace(rules, gaps=False)).stuck == [], "the two rules part only behind a gap"
