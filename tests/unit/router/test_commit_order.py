"""Engines go on beside the publication of what they hold: the ledger's word comes later, and may be no."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from milepost import errors
from milepost.types import EngineState
from milepost_router.plan import Phase
from milepost_router.record import Transition


@pytest.fixture
async def committing(bench: Any, tools: Any) -> AsyncIterator[Any]:
    """Version 1 is transferred, its commit under way, and the ledger is silent."""
    held = tools.HeldLedger(bench)
    prepared = await bench.transactions.prepare(tools.request())
    await tools.transfer(bench, prepared)
    task = asyncio.create_task(tools.commit(bench, prepared))
    yield held, prepared, task
    held.answer()
    await asyncio.gather(task, return_exceptions=True)


def serving(bench: Any) -> bool:
    return set(bench.states().values()) == {"SERVING"}


async def test_engines_serve_while_the_ledger_has_not_answered_and_the_commit_waits_for_it(
    bench, tools, committing
):
    held, prepared, task = committing
    await tools.until(lambda: serving(bench))
    assert [bench.record(name).version for name in "ab"] == [1, 1]
    assert not any(fake.paused for fake in bench.engines.values())
    assert bench.transactions.find(prepared.transaction_id).phase is Phase.COMMITTING
    assert not task.done()
    held.answer()
    committed = await task
    assert (committed.serving, committed.published) == (("a", "b"), True)
    [published] = bench.ledger.published
    assert published.members == ("a", "b")


async def test_the_ledger_is_told_while_an_engine_is_still_being_named(bench, tools):
    held = tools.HeldLedger(bench)
    prepared = await bench.transactions.prepare(tools.request(engine_ids=("b",)))
    await tools.transfer(bench, prepared)
    bench.engines["b"].hang("update_weight_version")
    task = asyncio.create_task(tools.commit(bench, prepared))
    async with asyncio.timeout(10):
        await held.asked.wait()
    held.answer()
    committed = await task
    assert (committed.serving, committed.published) == ((), True)
    assert list(committed.quarantined) == ["b"], "published, and nobody serves it: the trainer tries again"


async def test_a_version_that_is_refused_after_engines_went_on_is_withdrawn(bench, tools, committing):
    held, prepared, task = committing
    seen: list[Transition] = []
    bench.fleet.subscribe(lambda transition: seen.append(transition) if transition else None)
    await tools.until(lambda: serving(bench))
    bench.ledger.refusal = errors.StaleTerm("term 1 is over")
    held.answer()
    with pytest.raises(errors.StaleTerm):
        await task
    assert bench.states() == {"a": "STALE", "b": "STALE"}
    withdrawn = {t.engine.engine_id for t in seen if t.withdrawn}
    assert withdrawn == {"a", "b"}
    assert all(t.before is EngineState.SERVING for t in seen if t.withdrawn)
    assert not any(bench.record(name).routable or bench.record(name).version for name in "ab")
    transaction = bench.transactions.find(prepared.transaction_id)
    assert transaction.phase is Phase.ABORTED
    assert await bench.transactions.abort(prepared.transaction_id, term=1, reason="late") == ("a", "b")
    again = await bench.transactions.prepare(tools.request(attempt=2))
    assert [m.engine_id for m in again.members] == ["a", "b"]
    assert again.version == 2


async def test_of_a_refusal_in_between_those_who_serve_are_withdrawn_and_the_others_put_back(
    bench, tools, committing
):
    """Engine a serves, engine b has its name and is about to go on, when the ledger says no."""
    held, prepared, task = committing
    may_resume = asyncio.Event()

    async def slowly(request: Any, body: Any) -> None:
        await may_resume.wait()

    bench.engines["b"].reactions["continue_generation"] = slowly
    await bench.engines["b"].called("continue_generation")
    await tools.until(lambda: bench.states()["a"] == "SERVING")
    bench.ledger.refusal = errors.FailedPrecondition("void")
    held.answer()
    await tools.until(lambda: bench.states()["a"] == "STALE")
    assert bench.states() == {"a": "STALE", "b": "UPDATING"}, "it does not wait for the slow one"
    may_resume.set()
    with pytest.raises(errors.FailedPrecondition):
        await task
    assert bench.states() == {"a": "STALE", "b": "STALE"}
    assert bench.engines["b"].version_string == f"updating/{prepared.transaction_id}"
    assert "abort_request" in bench.engines["b"].calls
    assert not any(fake.paused for fake in bench.engines.values())


async def test_an_engine_that_is_lost_before_the_ledger_answers_is_the_fleets_affair(
    bench, tools, committing
):
    held, _, task = committing
    await tools.until(lambda: serving(bench))
    bench.fleet.remove("a")
    held.answer()
    committed = await task
    assert committed.published
    assert bench.states() == {"b": "SERVING"}


async def test_a_newer_trainer_waits_for_the_ledgers_word_on_the_older_ones_version(bench, tools, committing):
    held, prepared, task = committing
    await tools.until(lambda: serving(bench))
    taking_over = asyncio.create_task(bench.transactions.prepare(tools.request(term=2)))
    await tools.until(lambda: bench.transactions.find(prepared.transaction_id).phase is Phase.COMMITTING)
    bench.ledger.refusal = errors.StaleTerm("term 1 is over")
    held.answer()
    with pytest.raises(errors.StaleTerm):
        await task
    bench.ledger.refusal = None
    successor = await taking_over
    assert [m.engine_id for m in successor.members] == ["a", "b"]
    assert successor.version == 2
