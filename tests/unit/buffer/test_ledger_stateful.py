"""Random histories against a plain in-memory model: Hypothesis drives both; they must agree throughout.

After each history the run is brought to its end by fair moves alone: no reachable state is a dead end.
`MILEPOST_LEDGER_EXAMPLES` sets how many histories.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ledger_model import (
    ASSIGNED,
    DROPPED,
    GROUP_BYTES,
    READY,
    ROLLING,
    TRAINED,
    TTL_S,
    WAITING,
    DropReason,
    Model,
)  # fmt: skip

from milepost import errors
from milepost import types as t
from milepost_buffer.ledger import open_ledger


class Machine(RuleBasedStateMachine):
    """Drives a real ledger and the model with the same moves."""

    redis_url = ""
    make_bench_group = staticmethod(lambda *a, **k: None)
    make_bench_prompt = staticmethod(lambda *a, **k: None)

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.leases: list[tuple[str, int, int]] = []
        self.history: dict[int, list[str]] = {}
        self.instances = Counter[str]()
        self.names = 0
        self.audits = Counter[str]()

    def do(self, coroutine):
        return self.runner.run(coroutine)

    @initialize(
        size=st.integers(1, 3),
        staleness=st.integers(0, 2),
        on_stale=st.sampled_from([t.OnStale.REQUEUE, t.OnStale.WAIT, t.OnStale.DROP]),
        stale_attempts=st.integers(0, 2),
        tail=st.sampled_from([t.Tail.TRAIN, t.Tail.DROP]),
        slow_audit=st.booleans(),
    )
    def start(self, size, staleness, on_stale, stale_attempts, tail, slow_audit) -> None:
        config = t.RunConfig(
            groups_per_step=size,
            samples_per_prompt=1,
            max_staleness=staleness,
            on_stale=on_stale,
            stale_attempts=stale_attempts,
            max_attempts=3,
            tail=tail,
            lease_ttl_s=TTL_S,
            max_group_bytes=100,
            max_payload_bytes=20_000,
        )
        self.model = Model(config)
        self.slow_audit = slow_audit
        opened = open_ledger(self.redis_url, clock=lambda: self.model.now)
        self.ledger = self.do(self.stack.enter_async_context(opened))
        self.run_id = f"s{os.getpid()}-{os.urandom(6).hex()}"
        self.do(self.ledger.runs.create(self.run_id, config=config))
        self.model.term = self.do(self.open_term())
        self.do(self.state(0))
        self.publish_label(0)

    async def open_term(self) -> int:
        return (await self.ledger.steps.open_term(self.run_id, consumer_id="trainer")).term

    async def state(self, checkpoint: int, on_gap: t.OnGap = t.OnGap.FAIL) -> None:
        await self.ledger.steps.state_checkpoint(
            self.run_id,
            consumer_id="trainer",
            term=self.model.term,
            checkpoint_step=checkpoint,
            on_gap=on_gap,
        )

    # ------------------------------------------------------------------ prompt clients

    @rule(count=st.integers(1, 5), source=st.sampled_from(["", "a", "b"]), again=st.booleans())
    def put(self, count: int, source: str, again: bool) -> None:
        m = self.model
        if source and source not in m.sources:
            self.do(self.ledger.prompts.open_source(self.run_id, source_id=source))
            m.sources[source] = True
        if source and not m.sources[source]:
            return
        names = [f"p{self.names + i}" for i in range(count)]
        if again and m.rows:
            names.insert(0, next(iter(m.rows)))
        before = m.cursors.get(source, "")
        expected = m.put(names, source)
        self.names += count
        batch = [self.make_bench_prompt(n, cursor=n) for n in names]
        try:
            result = self.do(
                self.ledger.prompts.put(self.run_id, prompts=batch, source_id=source, expected_cursor=before)
            )
        except errors.ResourceExhausted:
            assert expected == 0
            return
        assert result.accepted == expected
        assert result.cursor == m.cursors.get(source, "")

    @rule(source=st.sampled_from(["a", "b"]))
    @precondition(lambda self: any(self.model.sources.values()))
    def close_source(self, source: str) -> None:
        if source in self.model.sources:
            self.model.sources[source] = False
            still_open = self.do(self.ledger.prompts.close_source(self.run_id, source_id=source))
            assert still_open == sum(self.model.sources.values())

    @rule(data=st.data())
    @precondition(lambda self: self.model.rows)
    def cancel(self, data) -> None:
        row = self.model.rows[data.draw(st.sampled_from(sorted(self.model.rows)))]
        result = self.do(self.ledger.prompts.cancel(self.run_id, prompt_ids=[row.name]))
        assert bool(result.cancelled) == (row.state in (WAITING, ROLLING, READY))
        if result.cancelled:
            self.model.drop(row, DropReason.CANCELLED)

    # ------------------------------------------------------------------ gateways

    @rule(gateway=st.sampled_from(["g", "h"]), count=st.integers(1, 6), restart=st.booleans())
    def lease(self, gateway: str, count: int, restart: bool) -> None:
        self.instances[gateway] += restart
        instance = f"{gateway}{self.instances[gateway]}"
        expected = self.model.lease(gateway, instance, count)
        found = self.do(
            self.ledger.prompts.lease(
                self.run_id, gateway_id=gateway, instance_id=instance, max_prompts=count
            )
        )
        assert [(x.prompt_id, x.attempt) for x in found.leases] == expected
        assert not expected or (found.min_version, found.label) == (self.model.newest, self.model.label)
        assert not expected or (self.model.room() >= 0 and self.model.bytes_room() >= 0), "over-admission"
        self.leases += [(name, attempt, found.min_version) for name, attempt in expected]

    @rule(data=st.data(), salt=st.sampled_from("xxxy"))
    @precondition(lambda self: self.leases)
    def seal(self, data, salt: str) -> None:
        name, attempt, first = data.draw(st.sampled_from(self.leases[-12:]))
        later = [v for v in self.model.versions if v >= first]
        self.seal_one(name, attempt, salt, sorted({first, data.draw(st.sampled_from(later))}))

    def seal_one(self, name: str, attempt: int, salt: str, versions: list[int]) -> None:
        expected = self.model.seal(name, attempt, salt, versions)
        made = self.make_bench_group(name, attempt, salt=salt, versions=versions, samples=1, size=GROUP_BYTES)
        (result,) = self.do(self.ledger.prompts.seal(self.run_id, groups=[made]))
        assert result.status == expected, result

    @rule(data=st.data(), what=st.sampled_from(["renew", "release", "fail", "drop"]))
    @precondition(lambda self: self.leases)
    def touch_lease(self, data, what: str) -> None:
        name, attempt, _ = data.draw(st.sampled_from(self.leases[-12:]))
        row, key = self.model.rows[name], t.LeaseKey(prompt_id=name, attempt=attempt)
        held = row.state == ROLLING and row.attempt == attempt
        instance = row.instance or "nobody"
        if what == "renew":
            renewed = self.do(
                self.ledger.prompts.renew(self.run_id, instance_id=instance, leases=[key], names_all=True)
            )
            assert (not renewed.lost) == held
            rolling = {n: r for n, r in self.model.rows.items() if r.state == ROLLING}
            of_instance = {(n, r.attempt) for n, r in rolling.items() if r.instance == instance}
            assert {(k.prompt_id, k.attempt) for k in renewed.unnamed} == of_instance - {(name, attempt)}
            row.expiry = self.model.now + TTL_S * 1000 if held else row.expiry
            return
        drop = DropReason.INVALID if what == "drop" else DropReason.UNSPECIFIED
        result = self.do(
            self.ledger.prompts.release(
                self.run_id, instance_id=instance, leases=[key], failed=what == "fail", drop_reason=drop
            )
        )
        assert result.released == held
        if held and what == "drop":
            self.model.drop(row, DropReason.INVALID)
        elif held and what == "fail":
            self.model.fail_lease(row)
        elif held:
            self.model.wait(row)

    @rule(seconds=st.integers(1, 12))
    def pass_time(self, seconds: int) -> None:
        self.model.now += seconds * 1000

    # ------------------------------------------------------------------ trainer

    @rule(ahead=st.sampled_from([1, 1, 1, 2]))
    def lease_step(self, ahead: int) -> None:
        step = self.model.committed + ahead
        if ahead == 1 or step - 1 in self.model.steps:
            self.lease_this(step)

    def lease_this(self, step: int) -> str:
        """Leases a step on both sides; returns "leased", "pending" or "finished"."""
        kept = set(self.model.steps)
        expected = self.model.lease_step(step)
        for moved in kept - set(self.model.steps):  # to this step, which had others before the gap
            self.history[step] = self.history.pop(moved)
        try:
            found = self.do(
                self.ledger.steps.lease(self.run_id, consumer_id="trainer", term=self.model.term, step=step)
            )
        except errors.OutOfRange:
            assert expected == "finished"
            return "finished"
        if isinstance(expected, str):
            assert expected == "pending"
            assert found.pending
            return expected
        assert [g.prompt_id for g in found.groups] == expected
        assert all(g.staleness <= found.max_staleness for g in found.groups)
        assert self.history.setdefault(step, expected) == expected, "another order"
        return "leased"

    @rule(steps=st.integers(1, 3))
    def whole_steps(self, steps: int) -> None:
        """Gets histories far enough to have something to resume, trim and lose."""
        for _ in range(steps):
            self.put(5, "", again=False)
            self.lease("g", 6, restart=False)
            for name, attempt, version in self.leases[-6:]:
                if self.model.rows[name].state == ROLLING:
                    self.seal_one(name, attempt, "x", [version])
            if self.lease_this(self.model.committed + 1) == "leased":
                self.commit_this(self.model.committed + 1, [])
            self.publish()

    @rule(data=st.data())
    @precondition(lambda self: self.model.committed + 1 in self.model.steps)
    def commit(self, data) -> None:
        step = self.model.committed + 1
        dropped = data.draw(st.lists(st.sampled_from(self.model.steps[step]), max_size=1))
        self.commit_this(step, dropped)

    def commit_this(self, step: int, dropped: list[str]) -> None:
        ids = self.model.steps[step]
        self.model.commit(step, dict.fromkeys(dropped, DropReason.FILTER))
        groups = [t.DroppedGroup(prompt_id=name, reason=DropReason.FILTER) for name in dropped]
        self.do(
            self.ledger.steps.commit(
                self.run_id,
                consumer_id="trainer",
                term=self.model.term,
                step=step,
                prompt_ids=ids,
                dropped=groups,
            )
        )

    @rule()
    def reserve_and_fail(self) -> None:
        self.reserve(max(self.model.committed, self.model.label))

    def reserve(self, label: int) -> int:
        m = self.model
        attempt = len(m.versions) + 1
        number = self.do(self.ledger.versions.reserve(self.run_id, term=m.term, step=label, attempt=attempt))
        assert number == attempt, "numbers are never used twice"
        m.versions[number] = (label, "reserved", m.term)
        return number

    @rule()
    def publish(self) -> None:
        if self.model.committed >= self.model.label:  # replay is silent
            self.publish_label(self.model.committed)

    def publish_label(self, label: int) -> None:
        self.publish_number(self.reserve(label))

    def publish_number(self, number: int) -> None:
        m = self.model
        label = m.versions[number][0]
        self.do(self.ledger.versions.publish(self.run_id, term=m.term, version=number, label=label))
        m.versions[number] = (label, "published", m.term)
        if number > m.newest:
            m.newest, m.label = number, label

    @rule(data=st.data())
    @precondition(lambda self: any(v[1] == "reserved" for v in self.model.versions.values()))
    def publish_late(self, data) -> None:
        m = self.model
        late = [
            n for n, v in m.versions.items() if v[1] == "reserved" and (n > m.newest) == (v[0] >= m.label)
        ]
        if late:
            self.publish_number(data.draw(st.sampled_from(late)))

    @rule(data=st.data())
    def crash_and_resume(self, data) -> None:
        m = self.model
        checkpoint = data.draw(st.integers(max(0, m.committed - 3), m.committed))
        on_gap = data.draw(st.sampled_from([t.OnGap.FAIL, t.OnGap.FAIL, t.OnGap.REGENERATE, t.OnGap.DROP]))
        m.now += 1
        term = self.do(self.open_term())
        assert term > m.term
        m.open_term(term)
        if checkpoint < m.trimmed and on_gap == t.OnGap.FAIL:
            with pytest.raises(errors.DataLoss):
                self.do(self.state(checkpoint))
            checkpoint = m.trimmed
        self.do(self.state(checkpoint, on_gap))
        for step in range(checkpoint + 1, m.trimmed + 1):
            self.history.pop(step, None)
        m.resume(checkpoint, on_gap)

    @rule(data=st.data())
    @precondition(lambda self: self.model.committed)
    def trim(self, data) -> None:
        step = data.draw(st.integers(0, self.model.committed))
        self.model.trim(step)
        result = self.do(
            self.ledger.steps.trim(self.run_id, consumer_id="trainer", term=self.model.term, step=step)
        )
        assert result.trimmed_step == self.model.trimmed

    @rule(size=st.integers(1, 3), staleness=st.integers(0, 2))
    def update(self, size: int, staleness: int) -> None:
        change = t.RunConfig(groups_per_step=size, max_staleness=staleness)
        self.do(self.ledger.runs.update(self.run_id, config=change))
        self.model.config = replace(self.model.config, groups_per_step=size, max_staleness=staleness)

    # ------------------------------------------------------------------ judgement

    @invariant()
    def the_books_agree(self) -> None:
        if not hasattr(self, "ledger"):
            return
        m = self.model
        stats = self.do(self.ledger.accounts.stats(self.run_id))
        m.reap()
        states = Counter(r.state for r in m.rows.values())
        counts = (stats.waiting, stats.rolling, stats.ready, stats.assigned, stats.trained)
        assert counts == tuple(states[s] for s in (WAITING, ROLLING, READY, ASSIGNED, TRAINED))
        assert stats.accepted == len(m.rows) == sum(counts) + sum(stats.dropped.values())
        assert stats.dropped == Counter(r.why.name.lower() for r in m.of(DROPPED))
        assert stats.admissible == max(0, min(m.room(), m.bytes_room()))
        assert stats.credits == m.credits()
        assert stats.payload_bytes == GROUP_BYTES * sum(r.held for r in m.rows.values())
        assert (stats.committed_step, stats.trimmed_step) == (m.committed, m.trimmed)
        assert stats.leased_step == max(m.steps, default=0)
        assert (stats.weight_version, stats.weight_label, stats.term) == (m.newest, m.label, m.term)
        if self.slow_audit:
            self.audit_goes_on()
            return
        report = self.do(self.ledger.accounts.own_audit(self.run_id)).report
        assert report.closes, report.problems
        assert report.beyond_bound == 0

    def audit_goes_on(self) -> None:
        """One row a move, with moves in between: the sums of the last call are those of its instant."""
        begins = self.audits["begun"] == self.audits["done"]
        self.audits["begun"] += begins
        token = f"audit {self.audits['begun']}"
        reply = self.do(self.ledger.store.call(self.run_id, "audit_rows", token, int(begins), 1))
        done, lost, beyond, _, problems, *sums = reply
        assert (lost, beyond, problems) == (0, 0, [])
        if done:
            states = Counter(r.state for r in self.model.rows.values())
            assert sums[0] == len(self.model.rows)
            assert sums[1] == states[TRAINED]
            self.audits["done"] += 1

    def finish(self) -> None:
        """Fair moves alone must bring the run to its end."""
        m = self.model
        if "end" not in m.sources:
            self.do(self.ledger.prompts.open_source(self.run_id, source_id="end"))
        for source in [*m.sources, "end"]:
            m.sources[source] = False
            self.do(self.ledger.prompts.close_source(self.run_id, source_id=source))
        for _ in range(20 + 6 * len(m.rows) + len(m.steps)):
            if m.committed > m.label or (m.committed == m.label and not m.newest):
                self.publish_label(m.committed)
            m.now += TTL_S * 1000  # whatever is rolling and was not sealed expires
            m.reap()
            self.do(self.ledger.accounts.stats(self.run_id))
            self.instances["g"] += 1
            self.lease("g", 6, restart=False)
            for name, attempt, version in self.leases[-6:]:
                if m.rows[name].state == ROLLING:
                    self.seal_one(name, attempt, "end", [version])
            outcome = self.lease_this(m.committed + 1)
            if outcome == "finished":
                assert not [r for r in m.rows.values() if r.state not in (TRAINED, DROPPED)]
                return
            if outcome == "leased":
                self.commit_this(m.committed + 1, [])
        raise AssertionError(f"no end in sight: {Counter(r.state.name for r in m.rows.values())}")

    def teardown(self) -> None:
        try:
            if hasattr(self, "ledger"):
                self.finish()
                self.do(self.ledger.store.call(self.run_id, "audit_end", f"audit {self.audits['begun']}"))
                self.slow_audit = False
                self.the_books_agree()
        finally:
            self.runner.run(self.stack.aclose())
            self.runner.close()


def test_random_histories_agree_with_the_model(redis_url, make_group, make_prompt) -> None:
    examples = int(os.environ.get("MILEPOST_LEDGER_EXAMPLES", "60"))

    class Bound(Machine):
        pass

    Bound.redis_url = redis_url
    Bound.make_bench_group = staticmethod(make_group)
    Bound.make_bench_prompt = staticmethod(make_prompt)
    run_state_machine_as_test(
        Bound,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            database=None,
            print_blob=False,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
