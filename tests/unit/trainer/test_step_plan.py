"""The plan of a step: contiguous updates, whole groups a rank, fetched once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost_trainer.plan import GroupInfo, plan_step

_INFOS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), min_size=1, max_size=20).map(
    lambda sizes: [GroupInfo(f"p{i}", tuple(s)) for i, s in enumerate(sizes)]
)


@given(_INFOS, st.integers(1, 4), st.integers(1, 5), st.integers(1, 200))
def test_every_group_is_trained_once_in_order_of_updates(
    infos: list[GroupInfo], num_ranks: int, updates: int, max_tokens: int
) -> None:
    plan = plan_step(3, infos, num_ranks=num_ranks, updates=updates, max_tokens=max_tokens)
    assert len(plan.updates) == min(updates, len(infos))
    shares = [sorted(p for own in update.groups for p in own) for update in plan.updates]
    assert [p for share in shares for p in share] == list(range(len(infos)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    fetched = [name for rank in range(num_ranks) for name in plan.prompt_ids_of(rank)]
    assert sorted(fetched) == sorted(info.prompt_id for info in infos)
    for update in plan.updates:
        for rank, bins in enumerate(update.packing.ranks):
            samples = sum(len(infos[p].num_tokens) for p in update.groups[rank])
            assert sorted(i for items in bins for i in items) == list(range(samples))


def test_no_groups_is_an_error() -> None:
    with pytest.raises(ValueError, match="step 3 has no groups"):
        plan_step(3, [], num_ranks=1, updates=1, max_tokens=1)
