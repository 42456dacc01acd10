"""The fleet's state machine: each arrow by name, then all of them at random."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from milepost import errors
from milepost import types as t
from milepost.types import EngineState as S
from milepost_router.fleet import Fleet, FleetLimits
from milepost_router.record import EngineRecord, Transition
from milepost_router.version_string import LoadedVersion

LIMITS = FleetLimits(probe_failures=3, request_failures=4, quarantine_s=1.0, quarantine_max_s=4.0)
TEXTS = ["default", "updating/tx", "run/1/0", "run/2/1"]
V1, V2 = LoadedVersion("run", 1, 0), LoadedVersion("run", 2, 1)


def engine(name: str = "a", *, url: str = "", run_id: str = "", instance_id: str = "i1") -> t.Engine:
    return t.Engine(engine_id=name, url=url or f"http://{name}:1", run_id=run_id, instance_id=instance_id)


def joined(fleet: Fleet, name: str = "a", **more: str) -> EngineRecord:
    return fleet.join(engine(name, **more), now=0.0)


def probed(fleet: Fleet, record: EngineRecord, text: str = "default", *, now: float = 0.0) -> None:
    fleet.probe_ok(record, text, generation=record.generation, now=now)


def dead(fleet: Fleet, record: EngineRecord) -> None:
    for _ in range(LIMITS.probe_failures):
        fleet.probe_failed(record, "silence", generation=record.generation)


def serving(fleet: Fleet, name: str = "a", loaded: LoadedVersion = V1, **more: str) -> EngineRecord:
    record = joined(fleet, name, **more)
    probed(fleet, record, str(loaded))
    assert fleet.admit(record, loaded, generation=record.generation)
    return record


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(limits=LIMITS)


def test_an_engine_joins_is_probed_and_stays_stale_until_its_weights_are_proven(fleet):
    record = joined(fleet)
    assert record.state is S.JOINING
    probed(fleet, record, str(V1))
    assert record.state is S.STALE
    assert not record.routable
    assert fleet.admit(record, V1, generation=record.generation)
    assert (record.state, record.version, record.label, record.run_id) == (S.SERVING, 1, 0, "run")
    assert record.routable


def test_an_engine_is_not_admitted_at_weights_it_does_not_carry(fleet):
    record = joined(fleet)
    probed(fleet, record, str(V1))
    assert not fleet.admit(record, V2, generation=record.generation)
    assert not fleet.admit(record, V1, generation=record.generation - 1)
    assert record.state is S.STALE


def test_an_engine_of_another_run_is_not_admitted(fleet):
    record = joined(fleet, run_id="other")
    probed(fleet, record, str(V1))
    assert not fleet.admit(record, V1, generation=record.generation)


def test_without_a_ledger_an_engine_that_answers_serves_version_0():
    fleet = Fleet(unversioned=True, limits=LIMITS)
    record = joined(fleet)
    probed(fleet, record)
    assert (record.state, record.version) == (S.SERVING, 0)
    probed(fleet, record, "somebody changed it")
    assert record.state is S.SERVING


def test_a_dead_engine_comes_back_stale_whatever_it_carries(fleet):
    record = serving(fleet)
    seen: list[Transition] = []
    fleet.subscribe(lambda x: seen.append(x) if x else None)
    epoch = fleet.fleet_epoch
    dead(fleet, record)
    assert (record.state, record.version, record.run_id) == (S.DEAD, 0, "")
    probed(fleet, record, str(V1))
    assert [(x.before, x.after) for x in seen] == [(S.SERVING, S.DEAD), (S.DEAD, S.STALE)]
    assert fleet.fleet_epoch == epoch + 2


def test_a_member_that_died_before_its_first_bucket_is_free_when_it_comes_back(fleet):
    record = serving(fleet)
    fleet.reserve(record, "run/1/2/1", run_id="run")
    dead(fleet, record)
    probed(fleet, record, str(V1))
    assert record.state is S.STALE
    assert fleet.eligible(record, 0.0), "no transaction will ever let it go"


def test_one_answer_forgives_failed_probes(fleet):
    record = serving(fleet)
    for _ in range(5):
        for _ in range(LIMITS.probe_failures - 1):
            fleet.probe_failed(record, "silence", generation=record.generation)
        probed(fleet, record, str(V1))
    assert record.state is S.SERVING


def test_another_version_string_means_a_restart(fleet):
    record = serving(fleet)
    probed(fleet, record, "default")
    assert (record.state, record.version) == (S.STALE, 0)
    assert "default" in record.detail


def test_what_a_probe_read_before_an_update_says_nothing_after_it(fleet):
    record = serving(fleet)
    read_under = record.generation
    update(fleet, record, V2)
    fleet.probe_ok(record, str(V1), generation=read_under, now=1.0)
    fleet.probe_failed(record, "silence", generation=read_under)
    assert (record.state, record.version, record.probe_failures) == (S.SERVING, 2, 0)


def update(fleet: Fleet, record: EngineRecord, loaded: LoadedVersion) -> None:
    fleet.reserve(record, "tx", run_id=loaded.run_id)
    fleet.begin_update(record, now=1.0)
    fleet.loaded_version(record, loaded)
    fleet.finish_update(record, now=3.0)


def test_an_update_pauses_routing_and_keeps_the_old_version_until_the_new_one_is_complete(fleet):
    record = serving(fleet)
    fleet.reserve(record, "tx", run_id="run")
    assert record.routable, "it serves until the first bucket"
    fleet.begin_update(record, now=1.0)
    assert not record.routable
    assert record.snapshot(1.0).weight_version == 1
    assert record.paused_s(2.5) == 1.5
    fleet.loaded_version(record, V2)
    fleet.finish_update(record, now=3.0)
    assert (record.state, record.version, record.transaction) == (S.SERVING, 2, "")
    assert record.paused_s(9.0) == 2.0


def test_nothing_counts_against_an_engine_that_is_updating(fleet):
    record = serving(fleet)
    fleet.reserve(record, "tx", run_id="run")
    fleet.begin_update(record, now=0.0)
    dead(fleet, record)
    for _ in range(LIMITS.request_failures):
        fleet.request_started(record)
        fleet.request_ended(record, failed=True, now=0.0)
    fleet.suspected(record)
    assert (record.state, record.suspect, record.probe_failures) == (S.UPDATING, False, 0)


def test_a_member_that_was_not_touched_is_what_it_was(fleet):
    served = serving(fleet, "a")
    stale = joined(fleet, "b")
    probed(fleet, stale)
    for record, expected in ((served, S.SERVING), (stale, S.STALE)):
        fleet.reserve(record, "tx", run_id="run")
        fleet.begin_update(record, now=0.0)
        fleet.restore(record, "nobody came", now=1.0)
        assert (record.state, record.transaction) == (expected, "")
    assert served.version == 1


def test_a_member_that_was_touched_is_stale(fleet):
    record = serving(fleet)
    fleet.reserve(record, "tx", run_id="run")
    fleet.begin_update(record, now=0.0)
    fleet.break_off(record, "the trainer died", "updating/tx", now=1.0)
    assert (record.state, record.version, record.version_string) == (S.STALE, 0, "updating/tx")
    probed(fleet, record, "updating/tx")
    assert record.state is S.STALE


def test_a_quarantined_engine_may_be_updated_again_once_it_answered_and_waited(fleet):
    record = serving(fleet)
    waits = []
    for now in (0.0, 10.0, 20.0, 30.0):
        fleet.reserve(record, "tx", run_id="run")
        fleet.begin_update(record, now=now)
        fleet.quarantine(record, "it hung", now=now)
        assert not fleet.eligible(record, now + 99.0), "it has not answered yet"
        probed(fleet, record, "updating/tx", now=now)
        assert record.state is S.QUARANTINED
        waits.append(next(w for w in itertools.count(0.0, 0.5) if fleet.eligible(record, now + w)))
    assert waits == [1.0, 2.0, 4.0, 4.0]
    update(fleet, record, V2)
    assert (record.state, record.strikes) == (S.SERVING, 0)


def test_requests_that_fail_in_a_row_quarantine_an_engine_and_one_success_forgives_them(fleet):
    record = serving(fleet)

    def request(*, failed: bool) -> None:
        fleet.request_started(record)
        fleet.request_ended(record, failed=failed, now=0.0)

    for _ in range(3):
        for _ in range(LIMITS.request_failures - 1):
            request(failed=True)
        request(failed=False)
    assert record.state is S.SERVING
    for _ in range(LIMITS.request_failures):
        request(failed=True)
    assert record.state is S.QUARANTINED
    assert record.snapshot(0.0).failures_total == 3 * 3 + 4


def test_a_suspect_is_out_of_routing_until_a_probe_has_looked(fleet):
    record = serving(fleet)
    fleet.suspected(record)
    assert (record.state, record.routable) == (S.SERVING, False)
    probed(fleet, record, str(V1))
    assert record.routable


def test_engines_outside_a_commit_become_stale(fleet):
    old, new, other = serving(fleet, "a"), serving(fleet, "b"), serving(fleet, "c", LoadedVersion("x", 1, 0))
    update(fleet, new, V2)
    fleet.outdate("run", 2)
    assert [e.state for e in (old, new, other)] == [S.STALE, S.SERVING, S.SERVING]


def test_a_version_that_the_ledger_refused_is_served_by_nobody(fleet):
    one, two = serving(fleet, "a"), serving(fleet, "b", V2)
    fleet.disown("run", 2, "void")
    assert (one.state, two.state) == (S.SERVING, S.STALE)


def test_a_drained_engine_leaves_routing_at_once_or_after_its_update(fleet):
    idle, busy = serving(fleet, "a"), serving(fleet, "b")
    fleet.reserve(busy, "tx", run_id="run")
    fleet.begin_update(busy, now=0.0)
    fleet.drain("a")
    fleet.drain("b")
    assert (idle.state, busy.state) == (S.DRAINING, S.UPDATING)
    fleet.loaded_version(busy, V2)
    fleet.finish_update(busy, now=1.0)
    assert busy.state is S.DRAINING


def test_a_new_instance_starts_afresh_and_the_old_one_must_register(fleet):
    record = serving(fleet)
    fleet.reserve(record, "tx", run_id="run")
    fleet.join(engine(instance_id="i2"), now=1.0)
    assert (record.state, record.transaction, record.version) == (S.JOINING, "", 0)
    with pytest.raises(errors.NotFound, match="register again"):
        fleet.heartbeat("a", "i1", now=1.0)
    assert fleet.heartbeat("a", "i2", now=1.0).state is S.JOINING


def test_the_same_instance_registers_twice_and_nothing_changes(fleet):
    record = serving(fleet)
    before = (fleet.fleet_epoch, fleet.revision)
    assert joined(fleet) is record
    assert (fleet.fleet_epoch, fleet.revision) == before


def test_a_url_belongs_to_who_registered_last_and_a_name_to_who_lives(fleet):
    serving(fleet, "a")
    joined(fleet, "b", url="http://a:1")
    assert fleet.get("a") is None
    with pytest.raises(errors.AlreadyExists, match="choose another name"):
        joined(fleet, "b", url="http://c:1")
    for wrong in (engine(""), engine("x", url="localhost:1")):
        with pytest.raises(errors.InvalidArgument, match=r"engine\.(engine_id|url)"):
            fleet.join(wrong, now=0.0)


def test_a_member_belongs_to_one_transaction(fleet):
    record = serving(fleet)
    fleet.reserve(record, "tx1", run_id="run")
    assert not fleet.eligible(record, 0.0)
    with pytest.raises(errors.FailedPrecondition, match="tx1"):
        fleet.reserve(record, "tx2", run_id="run")


def test_claiming_an_engine_of_another_run_goes_through_stale(fleet):
    record = serving(fleet)
    fleet.reserve(record, "tx", run_id="other")
    assert (record.state, record.run_id) == (S.STALE, "other")


def test_the_highest_version_counts_unproven_strings_too(fleet):
    serving(fleet, "a")
    probed(fleet, joined(fleet, "b"), "run/7/6")
    probed(fleet, joined(fleet, "c"), "other/9/9")
    assert fleet.highest_version("run") == 7


# ---- at random ---------------------------------------------------------------------------------------------


class FleetMachine(RuleBasedStateMachine):
    """Any event at any time: what must never happen does not happen."""

    records = Bundle("records")

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet(limits=LIMITS)
        self.now = 0.0
        self.proven: set[tuple[int, str]] = set()
        self.names = itertools.count()
        self.numbers = itertools.count(1)
        self.fleet.subscribe(self.on_transition)

    def on_transition(self, change: Transition | None) -> None:
        if change is None:
            return
        assert change.before is not change.after
        if change.after is S.SERVING:
            assert change.before in (S.STALE, S.UPDATING)
        if change.after is S.UPDATING:
            assert change.engine.transaction

    @rule(target=records, run_id=st.sampled_from(["", "run"]))
    def join(self, run_id):
        return joined(self.fleet, f"e{next(self.names)}", run_id=run_id)

    @rule(record=records, fresh=st.booleans())
    def register_again(self, record, fresh):
        if self.fleet.get(record.engine_id) is record:
            instance_id = f"i{next(self.names)}" if fresh else record.instance_id
            self.fleet.join(engine(record.engine_id, instance_id=instance_id), now=self.now)

    @rule(
        record=records,
        text=st.sampled_from(["default", "updating/tx", "run/1/0", "run/2/1"]),
        old=st.booleans(),
    )
    def probe(self, record, text, old):
        generation = record.generation - old
        self.fleet.probe_ok(record, text, generation=generation, now=self.now)

    @rule(record=records, times=st.integers(1, 3))
    def miss(self, record, times):
        for _ in range(times):
            self.fleet.probe_failed(record, "silence", generation=record.generation)

    @rule(record=records)
    def prove(self, record):
        if record.loaded is not None:
            self.fleet.admit(record, record.loaded, generation=record.generation)

    @rule(record=records)
    def prepare(self, record):
        if self.fleet.get(record.engine_id) is record and self.fleet.eligible(record, self.now):
            self.fleet.reserve(record, f"tx{next(self.numbers)}", run_id="run")

    @rule(record=records)
    def first_bucket(self, record):
        if record.transaction and record.state in (S.STALE, S.SERVING, S.QUARANTINED):
            self.fleet.begin_update(record, now=self.now)

    @rule(record=records, end=st.sampled_from(["finish", "restore", "break_off", "quarantine"]))
    def last_bucket(self, record, end):
        if record.state is not S.UPDATING:
            return
        if end == "finish":
            number = next(self.numbers)
            self.fleet.loaded_version(record, LoadedVersion("run", number, number))
            self.fleet.finish_update(record, now=self.now)
        elif end == "restore":
            self.fleet.restore(record, "aborted", now=self.now)
        elif end == "break_off":
            self.fleet.break_off(record, "aborted", "updating/tx", now=self.now)
        else:
            self.fleet.quarantine(record, "failed", now=self.now)

    @rule(record=records, failed=st.booleans())
    def request(self, record, failed):
        self.fleet.request_started(record)
        self.fleet.request_ended(record, failed=failed, now=self.now)

    @rule(record=records)
    def suspect(self, record):
        self.fleet.suspected(record)

    @rule(record=records)
    def drain(self, record):
        if self.fleet.get(record.engine_id) is record:
            self.fleet.drain(record.engine_id)

    @rule(record=records)
    def remove(self, record):
        if self.fleet.get(record.engine_id) is record:
            assert self.fleet.remove(record.engine_id)

    @rule(version=st.integers(1, 3))
    def commit_elsewhere(self, version):
        self.fleet.outdate("run", version)

    @rule(seconds=st.floats(0.1, 5.0))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def who_serves_has_weights(self):
        for record in self.fleet:
            if record.state is S.SERVING:
                assert record.version > 0
                assert record.run_id
            if record.routable:
                assert record.state is S.SERVING
                assert record.loaded == LoadedVersion(record.run_id, record.version, record.label)

    @invariant()
    def who_has_none_says_so(self):
        for record in self.fleet:
            shown = record.snapshot(self.now)
            if record.state in (S.JOINING, S.STALE, S.QUARANTINED, S.DEAD):
                assert (shown.weight_version, shown.weight_label) == (0, 0)

    @invariant()
    def updating_is_paused_and_nobody_else_is(self):
        for record in self.fleet:
            if record.state is S.UPDATING:
                assert record.transaction
                assert record.paused_since is not None
            elif record.state in (S.SERVING, S.STALE, S.QUARANTINED):
                assert record.paused_since is None

    @invariant()
    def nobody_waits_in_flight(self):
        assert all(record.in_flight == 0 for record in self.fleet)


TestFleetMachine = FleetMachine.TestCase
TestFleetMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
