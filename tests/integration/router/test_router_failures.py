"""Processes die in the middle of it: engines, the router, the trainer, the buffer."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from milepost import RouterClient, errors
from milepost import types as t
from milepost.channel import NO_RETRY
from milepost.types import EngineState, Transport
from moments import Missed, caught

pytestmark = pytest.mark.timeout(300)


async def server_info(helpers: Any, url: str) -> dict[str, Any]:
    async with helpers.http_session() as session, session.get(url + "/server_info") as reply:
        return await reply.json()


async def num_live(helpers: Any, url: str) -> int:
    state = (await server_info(helpers, url))["internal_states"][0]
    return state["num_running_reqs"] + state["num_waiting_reqs"]


async def post(helpers: Any, url: str, body: dict[str, Any] | None = None) -> int:
    async with helpers.http_session() as session, session.post(url, json=body or {}) as reply:
        return reply.status


async def test_a_request_outlives_its_engine(helpers, engines, start_engine, start_router):
    victim = start_engine()
    router = await start_router(engines[0].url, victim.url)
    async with helpers.http_session():
        pass

    async def serving() -> bool:
        async with helpers.http_session() as session, session.get(router.http + "/health") as reply:
            return (await reply.json())["serving"] == 2

    await helpers.until("both engines serve", serving)
    await post(helpers, victim.url + "/pause_generation", {"mode": "in_place"})
    asked = [asyncio.create_task(helpers.generate(router.http, tokens=8)) for _ in range(8)]

    async def stuck() -> bool:
        return await num_live(helpers, victim.url) >= 1

    await helpers.until("requests wait at the victim", stuck)
    victim.kill()
    answers = await asyncio.gather(*asked)
    assert [a.status for a in answers] == [200] * 8
    assert {a.headers["x-milepost-engine"] for a in answers} == {engines[0].engine_id}
    expected = (await helpers.generate(router.http, tokens=8)).body["output_ids"]
    assert all(a.body["output_ids"] == expected for a in answers)

    async def dead() -> bool:
        async with helpers.http_session() as session, session.get(router.http + "/engines") as reply:
            listed = {e["engine_id"]: e["state"] for e in (await reply.json())["engines"]}
            return listed[victim.engine_id] == "DEAD"

    await helpers.until("the victim is DEAD", dead)


async def test_the_engine_aborts_when_the_client_goes(helpers, engines, start_router):
    router = await start_router(engines[0].url)

    async def ready() -> bool:
        return (await helpers.generate(router.http)).status == 200

    await helpers.until("the engine serves", ready)
    for stream in (False, True):
        asked = asyncio.create_task(helpers.generate(router.http, tokens=50_000, stream=stream))

        async def running() -> bool:
            return await num_live(helpers, engines[0].url) == 1

        await helpers.until("the request runs", running)
        asked.cancel()
        await asyncio.wait([asked])

        async def gone() -> bool:
            return await num_live(helpers, engines[0].url) == 0

        await helpers.until("the engine has aborted it", gone)


async def test_a_deadline_ends_a_request_and_its_generation(helpers, engines, start_router):
    router = await start_router(engines[0].url)

    async def ready() -> bool:
        return (await helpers.generate(router.http)).status == 200

    await helpers.until("the engine serves", ready)
    late = await helpers.generate(router.http, tokens=50_000, headers={"x-milepost-deadline-ms": "200"})
    assert late.status == 504
    assert late.body["error"]["code"] == "DEADLINE_EXCEEDED"

    async def gone() -> bool:
        return await num_live(helpers, engines[0].url) == 0

    await helpers.until("the engine has aborted it", gone)


async def test_a_stream_goes_on_through_an_update(
    helpers, engines, buffer, start_router, publisher_of, run_id
):
    engine = engines[0]
    router = await start_router(engine.url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    labels = itertools.count()
    headers = {"x-milepost-run": run_id, "x-milepost-deadline-ms": "60000"}
    sampling = {"max_new_tokens": 3000, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": helpers.prompt, "sampling_params": sampling, "stream": True}

    async def stream_over_an_update() -> tuple[int, int, list[str]]:
        first = await publisher.publish(helpers.weights(1), label=next(labels))
        async with (
            helpers.http_session() as session,
            session.post(router.http + "/generate", json=body, headers=headers) as reply,
        ):
            assert reply.status == 200
            assert reply.headers["x-milepost-version-start"] == str(first.version)
            assert "x-milepost-version-end" not in reply.headers
            lines = reply.content
            await lines.readline()
            second = await publisher.publish(helpers.weights(2), label=next(labels))
            rest = (await lines.read()).decode().strip().split("\n\n")
        if rest[-1] == f": x-milepost-version-end: {first.version}":
            raise Missed
        return first.version, second.version, rest

    before, version, rest = await caught("an update in mid-stream", stream_over_an_update)
    assert rest[-1] == f": x-milepost-version-end: {version}"
    assert rest[-2] == "data: [DONE]"
    last = json.loads(rest[-3].removeprefix("data: "))
    assert len(last["output_ids"]) == 3000
    spans = json.dumps(last["meta_info"]["weight_versions"])
    assert f"{run_id}/{before}/" in spans
    assert f"{run_id}/{version}/" in spans


async def test_a_request_pinned_to_a_version_ends_at_the_update(
    helpers, engines, buffer, start_router, publisher_of, run_id
):
    router = await start_router(engines[0].url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    first = await publisher.publish(helpers.weights(1), label=0)
    pinned = {"x-milepost-run": run_id, "x-milepost-version": str(first.version)}
    asked = asyncio.create_task(helpers.generate(router.http, tokens=50_000, headers=pinned))

    async def running() -> bool:
        return await num_live(helpers, engines[0].url) == 1

    await helpers.until("the request runs", running)
    await publisher.publish(helpers.weights(2), label=1)
    answer = await asked
    assert answer.status == 412
    assert answer.body["error"]["code"] == "PINNED_VERSION_GONE"

    async def gone() -> bool:
        return await num_live(helpers, engines[0].url) == 0

    await helpers.until("the engine has ended it", gone)


@pytest.mark.parametrize("transport", [Transport.SHM, Transport.GLOO], ids=lambda x: x.name)
async def test_a_trainer_that_dies_in_mid_transfer_leaves_nobody_serving_a_mixture(
    helpers, engines, buffer, start_router, publisher_of, run_id, transport
):
    router = await start_router(*(e.url for e in engines), buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    first = await publisher.publish(helpers.weights(1), label=0)
    asked = asyncio.create_task(helpers.generate(router.http, tokens=60_000))

    async def running() -> bool:
        return sum([await num_live(helpers, e.url) for e in engines]) == 1

    await helpers.until("a request runs", running)
    state = helpers.weights(2)
    prepared = await publisher.prepare(state, label=1, transport=transport)
    part = helpers.split(state, 3)[0]

    async def one_bucket() -> AsyncIterator[t.BucketHeader]:
        yield publisher.header(prepared, 0, part, transport)
        if transport is Transport.GLOO:
            await publisher.broadcast(0, part)
        await asyncio.Event().wait()

    stream = publisher.router.update_weights(one_bucket(), timeout_s=60.0)
    assert all(a.ok for a in (await anext(stream)).acks)
    await helpers.all_are(publisher.router, EngineState.UPDATING)
    await stream.aclose()  # as the kernel does to a killed trainer's connection

    await helpers.all_are(publisher.router, EngineState.STALE)
    answer = await asked
    if answer.status == 200:
        assert answer.body["meta_info"]["finish_reason"]["type"] == "abort"
    else:
        assert answer.status == 503
    assert (await helpers.generate(router.http, headers={"x-milepost-run": run_id})).status == 503
    second = await publisher.publish(state, label=1)
    assert second.version > first.version
    await helpers.all_are(publisher.router, EngineState.SERVING, version=second.version)
    assert (await helpers.generate(router.http, headers={"x-milepost-run": run_id})).status == 200


async def test_an_engine_that_dies_breaks_a_collective_for_all(
    helpers, engines, start_engine, buffer, start_router, publisher_of
):
    victim = start_engine()
    router = await start_router(engines[0].url, victim.url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    state = helpers.weights(1)
    prepared = await publisher.prepare(state, label=0, transport=Transport.GLOO)
    assert len(prepared.members) == 2
    victim.kill()
    acks = await publisher.transfer(prepared, state, Transport.GLOO)
    survivor = engines[0].engine_id
    assert acks[-1].group_broken
    found = await helpers.states(publisher.router)
    assert found[survivor].state is EngineState.STALE
    again = await publisher.publish(state, label=0, transport=Transport.GLOO)
    assert again.serving == (survivor,)


async def test_the_others_go_on_without_an_engine_that_died(
    helpers, engines, start_engine, buffer, start_router, publisher_of
):
    victim = start_engine()
    router = await start_router(engines[0].url, victim.url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    state = helpers.weights(1)
    prepared = await publisher.prepare(state, label=0, transport=Transport.SHM)
    parts = helpers.split(state, 2)
    acked: asyncio.Queue[t.BucketAck] = asyncio.Queue()

    async def headers() -> AsyncIterator[t.BucketHeader]:
        yield publisher.header(prepared, 0, parts[0], Transport.SHM)
        assert all(a.ok for a in (await acked.get()).acks)
        victim.kill()
        yield publisher.header(prepared, 1, parts[1], Transport.SHM)

    async for ack in publisher.router.update_weights(headers(), timeout_s=60.0):
        acked.put_nowait(ack)
    committed = await publisher.commit(prepared, 2)
    assert committed.serving == (engines[0].engine_id,)
    assert list(committed.quarantined) == [victim.engine_id]

    async def dead() -> bool:
        return (await helpers.states(publisher.router))[victim.engine_id].state is EngineState.DEAD

    await helpers.until("the victim is DEAD", dead)


async def test_a_router_that_comes_back_knows_what_its_engines_serve(
    helpers, engines, buffer, start_router_process, publisher_of, run_id
):
    router = start_router_process(*(e.url for e in engines), buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    committed = await publisher.publish(helpers.weights(1), label=0)
    await post(helpers, engines[0].url + "/pause_generation", {"mode": "in_place"})
    router.kill()
    router = start_router_process(*(e.url for e in engines), buffer=buffer)
    heir = await publisher_of(router)
    await helpers.all_are(heir.router, EngineState.SERVING, version=committed.version)
    asked = [helpers.generate(router.http, headers={"x-milepost-run": run_id}) for _ in range(4)]
    answers = await asyncio.gather(*asked)
    assert {a.status for a in answers} == {200}
    assert {a.headers["x-milepost-engine"] for a in answers} == {e.engine_id for e in engines}


async def test_new_requests_wait_for_an_update_and_get_the_new_weights(
    helpers, engines, buffer, start_router, publisher_of, run_id
):
    router = await start_router(engines[0].url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    await publisher.publish(helpers.weights(1), label=0)
    state = helpers.weights(2)
    prepared = await publisher.prepare(state, label=1, transport=Transport.SHM)
    acks = await publisher.transfer(prepared, state, Transport.SHM)
    await helpers.all_are(publisher.router, EngineState.UPDATING)
    asked = asyncio.create_task(helpers.generate(router.http, headers={"x-milepost-run": run_id}))
    assert (await states_over_http(helpers, router)) == ["UPDATING"]
    assert not asked.done()
    second = await publisher.commit(prepared, len(acks))
    answer = await asked
    assert answer.status == 200
    assert answer.headers["x-milepost-version-start"] == str(second.version)


async def states_over_http(helpers: Any, router: Any) -> list[str]:
    async with helpers.http_session() as session, session.get(router.http + "/engines") as reply:
        return [e["state"] for e in (await reply.json())["engines"]]


async def test_two_routers_never_run_transactions_of_one_run_at_once(
    helpers, engines, buffer, start_router, publisher_of, run_id
):
    first = await start_router(engines[0].url, buffer=buffer)
    second = await start_router(engines[0].url, buffer=buffer)
    publisher, rival = await publisher_of(first), await publisher_of(second)
    publisher.term = rival.term
    await helpers.all_are(publisher.router, EngineState.STALE)
    await helpers.all_are(rival.router, EngineState.STALE)
    await publisher.publish(helpers.weights(1), label=0)
    impatient = RouterClient(second.grpc, retry=NO_RETRY)
    request = t.PrepareRequest(
        run_id=run_id,
        term=rival.term,
        label=1,
        attempt=9,
        transport=Transport.DISK,
        manifest=(t.TensorSpec(name="x", dtype="float32", shape=(1,)),),
    )
    async with impatient:
        with pytest.raises(errors.Unavailable, match="another router") as held:
            await impatient.prepare_weights(request)
    assert held.value.reason == "ROUTER_HELD"
    assert held.value.retry_after_s


async def test_a_router_that_comes_back_finishes_a_commit(
    helpers, engines, buffer, start_router, publisher_of, run_id
):
    engine = engines[0]
    router = await start_router(engine.url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    version = await publisher.weights.reserve_version(run_id, term=publisher.term, step=4, attempt=1)
    await post(
        helpers,
        engine.url + "/update_weight_version",
        {"new_version": f"{run_id}/{version}/4", "abort_all_requests": False},
    )
    await helpers.all_are(publisher.router, EngineState.SERVING, version=version)
    known = await publisher.weights.get_version(run_id)
    assert (known.version, known.label, known.members) == (version, 4, (engine.engine_id,))


async def test_an_engine_that_restarts_is_stale_until_it_is_given_weights(
    helpers, start_engine, buffer, start_router, publisher_of, run_id
):
    port = str(helpers.free_port())
    engine = start_engine("--port", port)
    router = await start_router(engine.url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    committed = await publisher.publish(helpers.weights(1), label=0)
    engine.kill()
    reborn = start_engine("--port", port)
    assert reborn.url
    await helpers.all_are(publisher.router, EngineState.STALE)
    assert (await helpers.generate(router.http, headers={"x-milepost-run": run_id})).status == 503
    again = await publisher.publish(helpers.weights(1), label=0, version=committed.version)
    assert again.version == committed.version
    await helpers.all_are(publisher.router, EngineState.SERVING, version=committed.version)


async def test_engines_register_themselves_drain_and_leave(helpers, start_engine, start_router):
    router = await start_router()
    engine = start_engine("--router", router.grpc, "--engine_id", "one")
    assert engine.url
    async with RouterClient(router.grpc) as client:
        await helpers.all_are(client, EngineState.SERVING)
        found = (await helpers.states(client))["one"]
        assert found.capabilities is not None
        assert found.capabilities.engine == "milepost 0.5.21"
        assert found.capabilities.context_length > 0
        await post(helpers, engine.url + "/pause_generation", {"mode": "in_place"})  # none ends by itself
        asked = asyncio.create_task(helpers.generate(router.http, tokens=20))

        async def running() -> bool:
            return (await helpers.states(client))["one"].in_flight == 1

        await helpers.until("the request runs", running)
        assert await client.drain_engine("one", max_wait_s=0.1) == 1
        draining = asyncio.create_task(client.drain_engine("one", max_wait_s=60.0))
        assert not asked.done()
        await post(helpers, engine.url + "/continue_generation")
        assert await draining == 0
        assert (await asked).status == 200
        assert (await helpers.states(client))["one"].state is EngineState.DRAINING
        assert (await helpers.generate(router.http)).status == 503
        assert await asyncio.to_thread(engine.stop) == 0

        async def gone() -> bool:
            return not await helpers.states(client)

        await helpers.until("the engine is forgotten", gone)


async def test_the_v1_routes_pass_and_no_other_engine_route_does(helpers, engines, start_router):
    router = await start_router(engines[0].url)

    async def ready() -> bool:
        return (await helpers.generate(router.http)).status == 200

    await helpers.until("the engine serves", ready)
    async with helpers.http_session() as session:
        async with session.get(router.http + "/v1/models") as reply:
            assert reply.status == 200
            assert (await reply.json())["data"][0]["id"]
            assert reply.headers["x-milepost-engine"] == engines[0].engine_id
        for path in ("/flush_cache", "/pause_generation", "/v1/../flush_cache", "/v1/%2e%2e/flush_cache"):
            async with session.post(router.http + path, json={}) as reply:
                assert reply.status == 404, path
        async with session.post(router.http + "/generate", data=b"rubbish") as reply:
            assert reply.status == 400  # the engine's own words
            assert reply.headers["x-milepost-engine"] == engines[0].engine_id
