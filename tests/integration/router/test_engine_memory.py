"""Engines give up memory while their trainer needs it, and get it back whoever dies in between."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from milepost import errors
from milepost.types import EngineState

pytestmark = pytest.mark.timeout(300)

TAGS = ("kv_cache", "weights")


async def released(helpers: Any, url: str) -> bool:
    """The engine itself says that it cannot generate."""
    return (await helpers.generate(url)).status == 503


async def detail(client: Any, run_id: str) -> set[tuple[EngineState, str]]:
    found = (await client.list_engines(run_id)).engines
    return {(e.state, e.detail) for e in found}


@pytest.fixture
async def serving(helpers, engines, buffer, start_router, publisher_of) -> Any:
    """A router whose engine serves, and its publisher."""
    router = await start_router(engines[0].url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    await publisher.publish(helpers.weights(1), label=0)
    return router, publisher


async def test_memory_is_given_up_and_taken_back_and_then_weights_are_needed(
    helpers, engines, serving, run_id
):
    router, publisher = serving
    change = await publisher.router.release_memory(run_id, term=publisher.term, tags=TAGS)
    assert (change.engines, change.failed) == ((engines[0].engine_id,), {})
    assert await released(helpers, engines[0].url)
    assert await detail(publisher.router, run_id) == {(EngineState.UPDATING, "its memory is released")}
    asked = asyncio.create_task(helpers.generate(router.http, headers={"x-milepost-run": run_id}))
    again = await publisher.router.release_memory(run_id, term=publisher.term, tags=TAGS)
    assert again.engines == (engines[0].engine_id,)
    change = await publisher.router.resume_memory(run_id, term=publisher.term)
    assert (change.engines, change.failed) == ((engines[0].engine_id,), {})
    await helpers.all_are(publisher.router, EngineState.STALE)
    assert (await publisher.router.resume_memory(run_id, term=publisher.term)).engines == ()
    assert not asked.done(), "its engine is about to be given weights"
    committed = await publisher.publish(helpers.weights(2), label=1)
    answer = await asked
    assert (answer.status, answer.headers["x-milepost-version-start"]) == (200, str(committed.version))
    answer = await helpers.generate(router.http, headers={"x-milepost-run": run_id})
    assert answer.status == 200
    assert answer.headers["x-milepost-version-start"] == str(committed.version)


async def test_requests_in_flight_end_before_memory_goes(helpers, engines, serving, run_id):
    router, publisher = serving
    long = asyncio.create_task(
        helpers.generate(router.http, tokens=60000, headers={"x-milepost-run": run_id})
    )

    async def runs() -> bool:
        return any(e.in_flight for e in (await publisher.router.list_engines(run_id)).engines)

    await helpers.until("a request is in flight", runs)
    change = await publisher.router.release_memory(run_id, term=publisher.term, tags=TAGS, drain_s=0.2)
    assert change.engines == (engines[0].engine_id,)
    answer = await long
    assert answer.status in (200, 503)
    assert answer.status == 503 or len(answer.body["output_ids"]) < 60000
    await publisher.router.resume_memory(run_id, term=publisher.term)


async def test_a_trainer_that_died_keeps_no_memory_for_ever(helpers, engines, serving, run_id):
    router, publisher = serving
    await publisher.router.release_memory(run_id, term=publisher.term, tags=TAGS, lease_s=1)
    await helpers.all_are(publisher.router, EngineState.STALE)
    refused = await helpers.generate(router.http, headers={"x-milepost-run": run_id})
    assert refused.status == 503, "nobody knows of weights that come"
    heir = (await publisher.buffer.resume_consumer(run_id)).term
    with pytest.raises(errors.StaleTerm):
        await publisher.router.release_memory(run_id, term=1)
    publisher.term = heir
    committed = await publisher.publish(helpers.weights(3), label=0)
    assert committed.serving == (engines[0].engine_id,)


async def test_a_router_that_comes_back_takes_the_lease_over(
    helpers, start_engine, buffer, start_router_process, publisher_of, run_id
):
    engine = start_engine()
    router = start_router_process(engine.url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    await publisher.publish(helpers.weights(1), label=0)
    await publisher.router.release_memory(run_id, term=publisher.term, tags=TAGS, lease_s=600)
    router.kill()
    router = start_router_process(engine.url, buffer=buffer)
    heir = await publisher_of(router)

    async def adopted() -> bool:
        return await detail(heir.router, run_id) == {(EngineState.UPDATING, "its memory is released")}

    await helpers.until("the lease stands", adopted)
    assert await released(helpers, engine.url)
    change = await heir.router.resume_memory(run_id, term=heir.term)
    assert change.engines == (engine.engine_id,)
    committed = await heir.publish(helpers.weights(2), label=1)
    assert committed.serving == (engine.engine_id,)


async def test_a_router_that_comes_back_ends_the_lease_of_a_trainer_that_does_not(
    helpers, start_engine, buffer, start_router_process, publisher_of, run_id
):
    engine = start_engine()
    router = start_router_process(engine.url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    await publisher.router.release_memory(run_id, term=publisher.term, tags=TAGS, lease_s=2)
    router.kill()
    router = start_router_process(engine.url, buffer=buffer)
    heir = await publisher_of(router)
    await helpers.all_are(heir.router, EngineState.STALE)
    committed = await heir.publish(helpers.weights(2), label=1)
    assert committed.serving == (engine.engine_id,)


async def test_an_engine_that_died_meanwhile_is_named_and_holds_nobody_up(
    helpers, engines, start_engine, buffer, start_router, publisher_of, run_id
):
    victim = start_engine()
    router = await start_router(engines[0].url, victim.url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    change = await publisher.router.release_memory(run_id, term=publisher.term, tags=TAGS)
    assert len(change.engines) == 2
    victim.kill()
    change = await publisher.router.resume_memory(run_id, term=publisher.term)
    assert change.engines == (engines[0].engine_id,)
    assert set(change.failed) == {victim.engine_id}
    committed = await publisher.publish(helpers.weights(2), label=0)
    assert committed.serving == (engines[0].engine_id,)
    assert router.grpc


async def test_a_router_that_stops_leaves_no_engine_without_its_memory(
    helpers, start_engine, buffer, start_router_process, publisher_of, run_id
):
    engine = start_engine()
    router = start_router_process(engine.url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    await publisher.router.release_memory(run_id, term=publisher.term, tags=("kv_cache",))
    assert await released(helpers, engine.url)
    assert router.stop() == 0
    assert (await helpers.generate(engine.url)).status == 200
