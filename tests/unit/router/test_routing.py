"""Which engine takes a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost.types import EngineState as S
from milepost_router import routing
from milepost_router.record import EngineRecord
from milepost_router.routing import Ask


def record(name: str, *, run_id: str = "run", version: int = 1, state: S = S.SERVING, **more) -> EngineRecord:
    made = EngineRecord(name, f"http://{name}", run_id=run_id, state=state, version=version)
    for key, value in more.items():
        setattr(made, key, value)
    return made


def test_the_engine_with_fewest_in_flight_takes_it():
    engines = [record("a", in_flight=3), record("b", in_flight=1), record("c", in_flight=2)]
    assert routing.choose(engines, Ask("run")) is engines[1]


def test_among_equals_they_take_turns():
    engines = [record("a", requests_total=5), record("b", requests_total=4)]
    assert routing.choose(engines, Ask("run")) is engines[1]


@pytest.mark.parametrize(
    ("ask", "fits"),
    [
        (Ask(), "abc"),
        (Ask("run"), "abc"),
        (Ask("run", min_version=2), "bc"),
        (Ask("run", version=2), "b"),
        (Ask("run", version=9), ""),
        (Ask("run", min_version=3, version=2), ""),
        (Ask("other"), "d"),
        (Ask("nobody"), ""),
    ],
)
def test_run_and_version_gate(ask, fits):
    engines = [record("a"), record("b", version=2), record("c", version=3), record("d", run_id="other")]
    able = {e.engine_id for e in engines if routing.choose([e], ask) is e}
    assert able - ({"d"} if not ask.run_id else set()) == set(fits)


@pytest.mark.parametrize("state", [s for s in S if s is not S.SERVING])
def test_only_serving_engines_take_requests(state):
    assert routing.choose([record("a", state=state)], Ask("run")) is None


def test_suspects_and_those_that_were_tried_take_none():
    engines = [record("a", suspect=True), record("b"), record("c", leaving=True)]
    assert routing.choose(engines, Ask("run")) is engines[1]
    assert routing.choose(engines, Ask("run"), tried=[engines[1]]) is None


_ENGINES = st.lists(
    st.tuples(st.sampled_from([S.SERVING, S.SERVING, S.UPDATING]), st.integers(0, 2), st.integers(0, 2),
              st.booleans(), st.booleans()),
    max_size=6,
)  # fmt: skip


@given(_ENGINES)
def test_a_request_that_demands_nothing_goes_where_the_policy_says(engines):
    records = [
        record(str(i), state=state, in_flight=flight, requests_total=total, suspect=suspect, leaving=leaving)
        for i, (state, flight, total, suspect, leaving) in enumerate(engines)
    ]
    fitting = [e for e in records if e.state is S.SERVING and not e.suspect and not e.leaving]
    expected = min(fitting, key=lambda e: (e.in_flight, e.requests_total, e.engine_id), default=None)
    assert routing.choose(records, routing.ANY) is expected
    assert routing.choose(records, Ask()) is expected


@given(st.lists(st.text(min_size=1), min_size=1, max_size=20, unique=True), st.integers(2, 6))
def test_a_session_moves_only_when_its_engine_leaves(sessions, count):
    engines = [record(f"e{i}") for i in range(count)]
    home = {s: routing.choose(engines, Ask("run", session=s)) for s in sessions}
    engines[0].in_flight = 99
    gone = engines[-1]
    for session in sessions:
        now = routing.choose(engines[:-1], Ask("run", session=session))
        assert now is home[session] or home[session] is gone


def test_sessions_spread_over_the_fleet():
    engines = [record(f"e{i}") for i in range(4)]
    homes = [routing.choose(engines, Ask(session=f"s{i}")).engine_id for i in range(400)]
    assert all(60 < homes.count(e.engine_id) < 140 for e in engines)


def test_a_policy_may_ignore_sessions():
    engines = [record("a", in_flight=1), record("b")]
    chosen = {
        routing.choose(engines, Ask(session=f"s{i}"), policy="least_in_flight").engine_id for i in range(9)
    }
    assert chosen == {"b"}


@pytest.mark.parametrize(
    ("engine", "comes"),
    [
        (record("a", state=S.UPDATING), True),
        (record("a", state=S.JOINING), True),
        (record("a", suspect=True), True),
        (record("a", state=S.STALE), False),
        (record("a", state=S.DEAD), False),
        (record("a", version=1), False),
        (record("a", state=S.UPDATING, run_id="other"), False),
    ],
)
def test_waiting_pays_only_while_an_engine_is_on_its_way(engine, comes):
    assert routing.may_come([engine], Ask("run", min_version=2)) is comes


def test_errors_say_what_was_asked_and_what_there_is():
    ask = Ask("run", min_version=3)
    assert ask.describe() == "run 'run', version 3 or newer"
    told = routing.describe_fleet([record("a"), record("b", state=S.STALE, version=0, detail="why")], ask)
    assert told == "a SERVING version 1; b STALE (why)"
    assert "no engine of that run" in routing.describe_fleet([record("a", run_id="x")], ask)
