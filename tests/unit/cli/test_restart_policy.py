"""Every arrow of the restart policy, and what it promises whatever the order of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost_common.up.policy import Life, Phase, RestartPolicy

POLICY = RestartPolicy(first_delay_s=1.0, max_delay_s=8.0, settled_s=10.0, crash_limit=3, window_s=60.0)


def dies(life: Life, at_s: float, *, code: int = 1) -> tuple[Life, float]:
    return life.spawned().exited(code, now_s=at_s, policy=POLICY)


def test_delays_double_up_to_the_longest() -> None:
    life, delays = Life(), []
    for i in range(6):
        at_s = 100.0 * i
        life, delay_s = life.spawned().ready(at_s).exited(1, now_s=at_s + 1, policy=POLICY)
        delays.append(delay_s)
        assert life.phase is Phase.BACKOFF
    assert delays == [1, 2, 4, 8, 8, 8]


def test_a_child_that_was_ready_for_long_starts_over_with_the_first_delay() -> None:
    life = Life()
    for at_s in (0.0, 20.0, 40.0):
        life, _ = life.spawned().ready(at_s).exited(1, now_s=at_s + 1, policy=POLICY)
    _, delay_s = life.spawned().ready(100.0).exited(-9, now_s=110.0, policy=POLICY)
    assert delay_s == 1


def test_early_deaths_within_the_window_are_a_failure() -> None:
    life, _ = dies(Life(), 1)
    life, _ = dies(life, 2)
    assert life.phase is Phase.BACKOFF
    life, delay_s = dies(life, 3)
    assert (life.phase, delay_s, life.exit_code) == (Phase.FAILED, 0.0, 1)


def test_early_deaths_of_one_that_was_ready_are_forgotten_after_the_window() -> None:
    life, _ = Life().spawned().ready(0.0).exited(1, now_s=1, policy=POLICY)
    for at_s in (10.0, 75.0, 140.0, 205.0, 270.0):
        life, _ = dies(life, at_s)
        assert life.phase is Phase.BACKOFF
    life, _ = dies(life, 271.0)
    life, _ = dies(life, 272.0)
    assert life.phase is Phase.FAILED


def test_early_deaths_of_one_that_was_never_ready_are_not_forgotten() -> None:
    life = Life()
    for at_s in (0.0, 1000.0, 2000.0):
        life, _ = dies(life, at_s)
    assert life.phase is Phase.FAILED


def test_being_ready_clears_early_deaths() -> None:
    life, _ = dies(Life(), 1)
    life, _ = dies(life, 2)
    life, _ = life.spawned().ready(3.0).exited(1, now_s=4, policy=POLICY)
    life, _ = dies(life, 5)
    life, _ = dies(life, 6)
    assert life.phase is Phase.BACKOFF


@pytest.mark.parametrize(("was_ready", "phase"), [(False, Phase.FAILED), (True, Phase.BACKOFF)])
def test_bad_settings_fail_at_once_unless_they_were_good_before(*, was_ready: bool, phase: Phase) -> None:
    life = Life().spawned()
    if was_ready:
        life, _ = life.ready(0.0).exited(1, now_s=1, policy=POLICY)
        life = life.spawned()
    life, _ = life.exited(2, now_s=2, policy=POLICY)
    assert life.phase is phase


def test_bad_settings_that_show_after_being_ready_are_believed_in_the_end() -> None:
    life, phases = Life(), []
    for code in (2, 2, 1, 2, 2, 2):
        life, _ = life.spawned().ready(0.0).exited(code, now_s=1, policy=POLICY)
        phases.append(life.phase)
    assert phases == [Phase.BACKOFF] * 5 + [Phase.FAILED]


@pytest.mark.parametrize("ready", [False, True])
def test_a_final_status_is_the_end(*, ready: bool) -> None:
    life = Life().spawned()
    life = life.ready(0.0) if ready else life
    life, _ = life.exited(0, now_s=1, final_codes=frozenset((0,)), policy=POLICY)
    assert life.phase is Phase.DONE


def test_what_was_asked_to_stop_stays_stopped() -> None:
    life, _ = Life().spawned().ready(0.0).stopping().exited(1, now_s=1, policy=POLICY)
    assert life.phase is Phase.STOPPED
    assert Life().stopping().phase is Phase.STOPPED
    assert life.stopping() == life


def test_a_readiness_line_counts_only_while_starting() -> None:
    life = Life().spawned().ready(1.0).stopping()
    assert life.ready(2.0) == life


@given(st.lists(st.tuples(st.floats(0, 30), st.booleans(), st.floats(0, 30), st.integers(-15, 3))))
def test_delays_are_bounded_and_a_failure_needs_its_cause(
    events: list[tuple[float, bool, float, int]],
) -> None:
    life, now_s, early, refusals = Life(), 0.0, 0, 0
    for start_s, ready, up_s, code in events:
        life = life.spawned()
        now_s += start_s
        if ready:
            life, early = life.ready(now_s), 0
            now_s += up_s
        else:
            early += 1
        refusals = refusals + 1 if code == 2 else 0
        life, delay_s = life.exited(code, now_s=now_s, policy=POLICY)
        assert 0 <= delay_s <= POLICY.max_delay_s
        if life.phase is Phase.FAILED:
            worn_out = not ready and early >= POLICY.crash_limit
            assert worn_out or refusals >= POLICY.crash_limit or (code == 2 and not life.was_ready)
            return
        assert life.phase is Phase.BACKOFF
        assert early < POLICY.crash_limit or life.was_ready
        assert refusals < POLICY.crash_limit
        now_s += delay_s
