"""Groups that break: the engine whose fault it is is found, and the others get their weights."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost_router.grouping import Grouping
from milepost_router.record import EngineRecord

PAUSE_S, PAUSE_MAX_S = 1.0, 8.0


def fleet_of(count: int) -> list[EngineRecord]:
    return [EngineRecord(f"e{i}", f"http://e{i}", instance_id="first") for i in range(count)]


@pytest.fixture
def grouping() -> Grouping:
    return Grouping(pause_s=PAUSE_S, pause_max_s=PAUSE_MAX_S)


def test_all_share_a_group_while_none_breaks(grouping) -> None:
    fleet = fleet_of(5)
    assert grouping.choose("run", fleet, now=0.0) == fleet


def test_a_group_of_one_that_breaks_makes_a_loner_that_waits_longer_each_time(grouping) -> None:
    fleet = fleet_of(2)
    waits = []
    for _ in range(6):
        grouping.broke("run", fleet[:1], fleet=fleet, now=100.0)
        waits.append(next(w for w in range(99) if grouping.choose("run", fleet[:1], now=100.0 + w)))
    assert waits == [1, 2, 4, 8, 8, 8]
    assert grouping.choose("run", fleet, now=1e6) == fleet[1:], "the others do not share a group with it"


def test_weights_clear_a_loner_and_so_does_a_new_instance(grouping) -> None:
    fleet = fleet_of(3)
    grouping.broke("run", fleet[:1], fleet=fleet, now=0.0)
    assert grouping.is_loner(fleet[0])
    restarted = EngineRecord("e0", "http://e0", instance_id="second")
    assert not grouping.is_loner(restarted)
    grouping.committed("run", fleet[:1], fleet=fleet)
    assert not grouping.is_loner(fleet[0])


def test_where_every_engine_breaks_its_group_none_is_to_blame(grouping) -> None:
    fleet = fleet_of(2)
    grouping.broke("run", fleet[:1], fleet=fleet, now=0.0)
    grouping.broke("run", fleet[1:], fleet=fleet, now=0.0)
    assert grouping.choose("run", fleet, now=0.0) == fleet[:1], "tried one at a time, without pauses"


@given(st.integers(2, 40), st.data())
def test_whoever_it_is_the_others_get_their_weights_after_few_groups(count, data) -> None:
    fleet = fleet_of(count)
    bad = data.draw(st.sets(st.sampled_from(range(count)), min_size=1, max_size=max(1, count // 3)))
    grouping = Grouping(pause_s=PAUSE_S, pause_max_s=PAUSE_MAX_S)
    cut_off = {fleet[i].engine_id for i in bad}
    needy, broken = list(fleet), 0
    while len(needy) > len(cut_off):
        group = grouping.choose("run", needy, now=0.0)
        if cut_off.intersection(e.engine_id for e in group):
            broken += 1
            grouping.broke("run", group, fleet=fleet, now=0.0)
        else:
            grouping.committed("run", group, fleet=fleet)
            needy = [e for e in needy if e not in group]
    assert {e.engine_id for e in needy} == cut_off
    assert broken <= len(cut_off) * (count.bit_length() + 1) ** 2
    assert grouping.choose("run", fleet, now=0.0)[0].engine_id not in cut_off


def test_runs_do_not_disturb_one_another(grouping) -> None:
    fleet = fleet_of(4)
    grouping.broke("one", fleet, fleet=fleet, now=0.0)
    assert len(grouping.choose("one", fleet, now=0.0)) == 2
    assert len(grouping.choose("other", fleet, now=0.0)) == 4
