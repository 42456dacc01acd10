"""The publisher's account: patience while the buffer is away, restating after Redis forgot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from milepost import types as t
from milepost.errors import (
    AlreadyExists,
    FailedPrecondition,
    MilepostError,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    StaleTerm,
    Unavailable,
)
from milepost_trainer import ledger as ledger_module
from milepost_trainer.ledger import Ledger


class FakeBuffer:
    """The few rules of the ledger that matter here, and a way to forget."""

    def __init__(self) -> None:
        self.redis_run_id = ""
        self.identity = "redis-1"
        self.run_exists = False
        self.term = 0
        self.committed: dict[int, tuple[str, ...]] = {}
        self.leased: set[int] = set()
        self.next_errors: list[MilepostError] = []
        self.calls: list[str] = []
        self.trimmed = 0

    def forget(self, *, keep_term: bool = False) -> None:
        self.identity += "'"
        self.committed, self.leased = {}, set()
        if not keep_term:
            self.run_exists, self.term = False, 0

    def _enter(self, name: str, *, needs_run: bool = True) -> None:
        self.calls.append(name)
        if self.next_errors:
            raise self.next_errors.pop(0)
        if needs_run and not self.run_exists:
            raise NotFound("no such run")
        self.redis_run_id = self.identity

    def _check_term(self, term: int) -> None:
        if term != self.term:
            raise StaleTerm(f"term {term} is not {self.term}")

    async def create_run(self, run_id: str, *, config: t.RunConfig) -> t.Run:
        self._enter("create_run", needs_run=False)
        self.run_exists = True
        return t.Run(run_id=run_id, config=config, term=self.term)

    async def get_run(self, run_id: str) -> t.Run:
        self._enter("get_run")
        return t.Run(run_id=run_id, config=t.RunConfig(), term=self.term)

    async def resume_consumer(
        self,
        run_id: str,
        *,
        term: int | None = None,
        checkpoint_step: int | None = None,
        manifest: Any = (),
        on_gap: t.OnGap = t.OnGap.UNSPECIFIED,
    ) -> t.ResumePoint:
        self._enter("resume_consumer")
        if term is None:
            self.term += 7
        elif term < self.term:
            raise StaleTerm("older")
        else:
            self.term = term
            for entry in manifest:
                if entry.step <= (checkpoint_step or 0):
                    self.committed.setdefault(entry.step, entry.prompt_ids)
        return t.ResumePoint(term=self.term)

    async def lease_step(
        self, run_id: str, *, term: int, step: int, max_wait_s: float, inline_bytes: int
    ) -> t.StepLease:
        self._enter("lease_step")
        self._check_term(term)
        self.leased.add(step)
        return t.StepLease(groups=(t.StepGroup(prompt_id=f"p{step}"),), checkpoint_wanted=step == 3)

    async def commit_step(
        self, run_id: str, *, term: int, step: int, prompt_ids: tuple[str, ...], dropped: Any
    ) -> t.CommitResult:
        self._enter("commit_step")
        self._check_term(term)
        if self.committed.get(step) != prompt_ids:
            if step not in self.leased:
                raise FailedPrecondition("not leased")
            self.committed[step] = prompt_ids
        return t.CommitResult(committed_step=step)

    async def trim_checkpointed(self, run_id: str, *, term: int, step: int) -> t.TrimResult:
        self._enter("trim_checkpointed")
        self._check_term(term)
        self.trimmed = step
        return t.TrimResult(trimmed_step=step)


@pytest.fixture
def buffer() -> FakeBuffer:
    return FakeBuffer()


@pytest.fixture
async def ledger(buffer: FakeBuffer, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    monkeypatch.setattr(ledger_module, "_FIRST_DELAY_S", 0.0)
    made = Ledger(buffer, run_id="run", config=t.RunConfig())  # type: ignore[arg-type]
    await made.create_run()
    await made.open_term()
    await made.state_checkpoint(0, manifest=(), on_gap=t.OnGap.FAIL)
    return made


async def step(ledger: Ledger, number: int) -> None:
    lease = await ledger.lease(number, max_wait_s=1)
    ids = tuple(group.prompt_id for group in lease.groups)
    await ledger.commit(t.StepManifest(step=number, prompt_ids=ids))


async def test_steps_become_history_until_they_are_trimmed(ledger: Ledger, buffer: FakeBuffer) -> None:
    for number in (1, 2, 3):
        await step(ledger, number)
    assert ledger.committed == 3
    await ledger.trim(2)
    assert buffer.trimmed == 2
    assert [entry.step for entry in ledger.history] == [3]


async def test_an_absent_buffer_is_asked_again(ledger: Ledger, buffer: FakeBuffer) -> None:
    buffer.next_errors = [Unavailable("away"), Unavailable("away")]
    await step(ledger, 1)
    assert buffer.committed == {1: ("p1",)}
    assert buffer.calls.count("lease_step") == 3


async def test_a_full_redis_is_asked_again_and_told(ledger: Ledger, buffer: FakeBuffer) -> None:
    buffer.next_errors = [ResourceExhausted("redis is full", reason="REDIS_FULL")]
    await ledger.lease(1, max_wait_s=1)
    assert ledger.full.is_set()
    buffer.next_errors = [ResourceExhausted("redis is full", reason="REDIS_FULL")]
    await ledger.commit(t.StepManifest(step=1, prompt_ids=("p1",)))
    assert buffer.committed == {1: ("p1",)}


async def test_waiting_for_an_absent_buffer_can_be_cancelled(ledger: Ledger, buffer: FakeBuffer) -> None:
    asked = asyncio.Event()

    async def away(*_: Any, **__: Any) -> t.StepLease:
        asked.set()
        raise Unavailable("away")

    buffer.lease_step = away  # type: ignore[method-assign]
    task = asyncio.create_task(ledger.lease(1, max_wait_s=1))
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("keep_term", [True, False])
@pytest.mark.parametrize("when", ["before the lease", "between lease and commit"])
async def test_a_redis_that_forgot_is_told_again(
    ledger: Ledger, buffer: FakeBuffer, keep_term: bool, when: str
) -> None:
    await step(ledger, 1)
    await step(ledger, 2)
    term = ledger.term
    if when == "before the lease":
        buffer.forget(keep_term=keep_term)
        await step(ledger, 3)
    else:
        await ledger.lease(3, max_wait_s=1)
        buffer.forget(keep_term=keep_term)
        await ledger.commit(t.StepManifest(step=3, prompt_ids=("p3",)))
    assert buffer.term == term
    assert buffer.committed == {1: ("p1",), 2: ("p2",), 3: ("p3",)}


async def test_a_lease_ahead_may_notice_first(ledger: Ledger, buffer: FakeBuffer) -> None:
    """The prefetch restates while the step trains; the step's commit is then restated as well."""
    await step(ledger, 1)
    await ledger.lease(2, max_wait_s=1)
    buffer.forget()
    await ledger.lease(3, max_wait_s=1)
    assert buffer.committed == {1: ("p1",)}
    await ledger.commit(t.StepManifest(step=2, prompt_ids=("p2",)))
    assert buffer.committed == {1: ("p1",), 2: ("p2",)}


async def test_a_newer_trainer_ends_it(ledger: Ledger, buffer: FakeBuffer) -> None:
    await step(ledger, 1)
    buffer.term += 1
    calls = len(buffer.calls)
    with pytest.raises(StaleTerm):
        await ledger.lease(2, max_wait_s=1)
    assert "resume_consumer" not in buffer.calls[calls:]


@pytest.mark.parametrize("make", [lambda: OutOfRange("done"), lambda: FailedPrecondition("no")])
async def test_other_refusals_are_the_callers(
    ledger: Ledger, buffer: FakeBuffer, make: Callable[[], MilepostError]
) -> None:
    error = make()
    buffer.next_errors = [error]
    calls = len(buffer.calls)
    with pytest.raises(type(error)):
        await ledger.lease(1, max_wait_s=1)
    assert "resume_consumer" not in buffer.calls[calls:]


async def test_a_refused_commit_is_no_history(ledger: Ledger, buffer: FakeBuffer) -> None:
    with pytest.raises(FailedPrecondition):
        await ledger.commit(t.StepManifest(step=9, prompt_ids=("x",)))
    assert ledger.history == []
    assert ledger.committed == 0


async def test_an_existing_run_with_other_settings_is_taken_as_it_is(buffer: FakeBuffer) -> None:
    buffer.run_exists = True
    buffer.next_errors = [AlreadyExists("other config")]
    made = Ledger(buffer, run_id="run", config=t.RunConfig())  # type: ignore[arg-type]
    assert (await made.create_run()).run_id == "run"


async def test_checkpoint_wanted_is_passed_on(ledger: Ledger) -> None:
    await ledger.lease(3, max_wait_s=1)
    assert ledger.checkpoint_wanted
