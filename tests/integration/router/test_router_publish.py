"""Weights reach real engines through a real router and ledger, by every transport; and what refuses them."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from milepost import errors
from milepost import types as t
from milepost.types import EngineState, Transport

pytestmark = pytest.mark.timeout(300)


async def model_info(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(url + "/model_info") as reply:
        return await reply.json()


@pytest.mark.parametrize("transport", [Transport.SHM, Transport.DISK, Transport.GLOO], ids=lambda x: x.name)
async def test_published_weights_are_served(
    helpers, engines, buffer, start_router, publisher_of, run_id, transport
):
    router = await start_router(*(e.url for e in engines), buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    refused = await helpers.generate(router.http, headers={"x-milepost-run": run_id})
    assert refused.status == 503
    assert refused.headers["Retry-After"] == "1"
    assert refused.body["error"]["code"] == "NO_ENGINE_FITS"
    assert run_id in refused.body["error"]["message"]

    committed = await publisher.publish(helpers.weights(1), label=0, transport=transport)

    assert committed.published
    assert sorted(committed.serving) == sorted(e.engine_id for e in engines)
    assert committed.quarantined == {}
    assert len(committed.checksums) == 2
    known = await publisher.weights.get_version(run_id)
    assert (known.version, known.label) == (committed.version, 0)
    for engine in engines:
        assert (await model_info(engine.url))["weight_version"] == f"{run_id}/{committed.version}/0"
    at_least = {"x-milepost-run": run_id, "x-milepost-min-version": str(committed.version)}
    answer = await helpers.generate(router.http, headers=at_least)
    assert answer.status == 200
    assert len(answer.body["output_ids"]) == 4
    assert answer.headers["x-milepost-version-start"] == str(committed.version)
    assert answer.headers["x-milepost-version-end"] == str(committed.version)
    assert answer.headers["x-milepost-engine"] in committed.serving


async def test_engines_of_one_layout_agree_and_a_second_version_replaces_the_first(
    helpers, engines, buffer, start_router, publisher_of, run_id
):
    router = await start_router(*(e.url for e in engines), buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    first = await publisher.publish(helpers.weights(1), label=0)
    second = await publisher.publish(helpers.weights(2), label=1)
    assert second.version > first.version
    assert first.checksums.keys() == second.checksums.keys()
    assert all(first.checksums[e] != second.checksums[e] for e in first.checksums)
    await helpers.all_are(publisher.router, EngineState.SERVING, version=second.version)

    async def ask(**headers: str) -> Any:
        wanted = {"x-milepost-run": run_id} | {k.replace("_", "-"): v for k, v in headers.items()}
        return await helpers.generate(router.http, headers=wanted)

    assert (await ask(x_milepost_version=str(second.version))).status == 200
    for wrong in (
        {"x_milepost_version": str(first.version)},
        {"x_milepost_min_version": str(second.version + 1)},
    ):
        refused = await ask(**wrong)
        assert refused.status == 503
        assert refused.body["error"]["code"] == "NO_ENGINE_FITS"
        assert f"version {second.version}" in refused.body["error"]["metadata"]["fleet"]
    bad = await ask(x_milepost_min_version="new")
    assert bad.status == 400
    assert "x-milepost-min-version = 'new'" in bad.body["error"]["message"]


async def test_weights_already_served_need_nobody(helpers, engines, buffer, start_router, publisher_of):
    router = await start_router(*(e.url for e in engines), buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    committed = await publisher.publish(helpers.weights(1), label=3)
    again = await publisher.prepare(
        helpers.weights(1), label=3, transport=Transport.SHM, version=committed.version
    )
    assert again.members == ()
    assert again.version == committed.version


async def test_commit_and_abort_are_idempotent(helpers, engines, buffer, start_router, publisher_of):
    router = await start_router(engines[0].url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    state = helpers.weights(1)
    prepared = await publisher.prepare(state, label=0, transport=Transport.SHM)
    acks = await publisher.transfer(prepared, state, Transport.SHM)
    first = await publisher.commit(prepared, len(acks))
    assert await publisher.commit(prepared, len(acks)) == first
    late = await publisher.router.abort_weights(prepared.transaction_id, term=publisher.term, reason="late")
    assert late == ()
    await helpers.all_are(publisher.router, EngineState.SERVING, version=first.version)


async def test_stale_term_and_stale_epoch_are_refused_by_name(
    helpers, engines, buffer, start_router, publisher_of
):
    router = await start_router(engines[0].url, buffer=buffer)
    old = await publisher_of(router)
    new = await publisher_of(router)
    await helpers.all_are(old.router, EngineState.STALE)
    state = helpers.weights(1)
    with pytest.raises(errors.StaleTerm, match=str(old.term)):
        await old.prepare(state, label=0, transport=Transport.SHM)  # the ledger knows the newer term
    prepared = await new.prepare(state, label=0, transport=Transport.SHM)
    with pytest.raises(errors.StaleTerm, match=str(new.term)):
        await old.prepare(state, label=0, transport=Transport.SHM)  # and now the router, too
    with pytest.raises(errors.StaleTerm):
        await new.router.abort_weights(prepared.transaction_id, term=old.term, reason="not yours")
    with pytest.raises(errors.StaleEpoch, match="prepare again"):
        await new.router.commit_weights(
            prepared.transaction_id, fleet_epoch=prepared.fleet_epoch + 1, term=new.term, num_buckets=0
        )
    with pytest.raises(errors.NotFound, match="nonsense"):
        await new.router.commit_weights("nonsense", fleet_epoch=1, term=new.term, num_buckets=0)


async def test_a_higher_term_ends_the_open_transaction(helpers, engines, buffer, start_router, publisher_of):
    router = await start_router(engines[0].url, buffer=buffer)
    old = await publisher_of(router)
    await helpers.all_are(old.router, EngineState.STALE)
    state = helpers.weights(1)
    first = await old.prepare(state, label=0, transport=Transport.SHM)
    new = await publisher_of(router)
    committed = await new.publish(state, label=0)
    assert committed.version > first.version
    with pytest.raises(errors.StaleTerm):
        await old.commit(first, 0)


@pytest.mark.parametrize("transport", [Transport.SHM, Transport.DISK], ids=lambda x: x.name)
async def test_weights_that_do_not_fit_are_refused_and_the_old_ones_served(
    helpers, engines, buffer, start_router, publisher_of, run_id, transport
):
    router = await start_router(engines[0].url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    good = await publisher.publish(helpers.weights(1), label=0)
    bad = {name: x[:-1] if "norm" in name else x for name, x in helpers.weights(2).items()}
    bad = dict(sorted(bad.items(), key=lambda item: "norm" not in item[0]))
    prepared = await publisher.prepare(bad, label=1, transport=transport)
    acks = await publisher.transfer(prepared, bad, transport)
    assert [a.ok for ack in acks for a in ack.acks] == [False]
    assert "norm" in acks[0].acks[0].message
    with pytest.raises(errors.FailedPrecondition):
        await publisher.commit(prepared, len(acks))
    await helpers.all_are(publisher.router, EngineState.SERVING, version=good.version)
    assert (await helpers.generate(router.http, headers={"x-milepost-run": run_id})).status == 200


@pytest.mark.parametrize("transport", [Transport.SHM, Transport.GLOO])
async def test_weights_that_lack_a_tensor_of_the_engines_model_cost_no_byte(
    helpers, engines, buffer, start_router, publisher_of, run_id, transport
):
    router = await start_router(engines[0].url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    good = await publisher.publish(helpers.weights(1), label=0)
    fewer = helpers.weights(2)
    lost = next(name for name in fewer if "norm" in name)
    del fewer[lost]
    prepared = await publisher.prepare(fewer, label=1, transport=transport)
    acks = await publisher.transfer(prepared, fewer, transport)
    assert [a.ok for ack in acks for a in ack.acks] == [False]
    assert f"1 tensors of the model are missing, '{lost}'" in acks[0].acks[0].message
    await helpers.all_are(publisher.router, EngineState.SERVING, version=good.version)
    assert (await helpers.generate(router.http, headers={"x-milepost-run": run_id})).status == 200


async def test_a_bucket_that_is_not_in_the_manifest_reaches_no_engine(
    helpers, engines, buffer, start_router, publisher_of
):
    router = await start_router(engines[0].url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    good = await publisher.publish(helpers.weights(1), label=0)
    state = helpers.weights(2)
    prepared = await publisher.prepare(state, label=1, transport=Transport.SHM)
    name = next(iter(state))
    with pytest.raises(errors.InvalidArgument, match=name):
        await publisher.transfer(prepared, state | {name: state[name].double()}, Transport.SHM)
    await helpers.all_are(publisher.router, EngineState.SERVING, version=good.version)


async def test_a_commit_of_half_the_weights_is_refused(helpers, engines, buffer, start_router, publisher_of):
    router = await start_router(engines[0].url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    state = helpers.weights(1)
    prepared = await publisher.prepare(state, label=0, transport=Transport.SHM)
    half = helpers.split(state, 2)[0]
    acks = await publisher.transfer(prepared, half, Transport.SHM)
    with pytest.raises(errors.FailedPrecondition, match=r"not sent|before all tensors were sent"):
        await publisher.commit(prepared, len(acks))
    stale = await publisher.router.abort_weights(
        prepared.transaction_id, term=publisher.term, reason="half of it is missing"
    )
    assert stale == (engines[0].engine_id,)
    await helpers.all_are(publisher.router, EngineState.STALE)
    assert (await publisher.publish(state, label=0)).serving == (engines[0].engine_id,)


async def test_the_fleet_can_be_watched_through_a_publication(
    helpers, engines, buffer, start_router, publisher_of, run_id
):
    router = await start_router(engines[0].url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    seen: list[EngineState] = []

    async def watch() -> None:
        async for fleet in publisher.router.watch_fleet(run_id, max_interval_s=30.0):
            seen.extend(e.state for e in fleet.engines if not seen or seen[-1] is not e.state)
            if seen[-1] is EngineState.SERVING:
                return

    async def began() -> bool:
        return bool(seen)

    watching = asyncio.create_task(watch())
    await helpers.until("the watch tells of the engine", began)
    await publisher.publish(helpers.weights(1), label=0)
    async with asyncio.timeout(60):
        await watching
    assert seen[-2:] == [EngineState.UPDATING, EngineState.SERVING]


async def test_a_named_engine_must_be_known_and_take_the_transport(
    helpers, engines, buffer, start_router, publisher_of
):
    router = await start_router(engines[0].url, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    state = helpers.weights(1)
    with pytest.raises(errors.NotFound, match="'nobody'"):
        await publisher.prepare(state, label=0, transport=Transport.SHM, engine_ids=("nobody",))
    for change, field in (
        ({"run_id": "a b"}, "run_id"),
        ({"transport": Transport.UNSPECIFIED}, "transport"),
        ({"manifest": ()}, "manifest"),
        ({"attempt": 0}, "attempt"),
    ):
        with pytest.raises(errors.InvalidArgument, match=field):
            await publisher.router.prepare_weights(
                t.PrepareRequest(
                    **{
                        "run_id": publisher.run_id,
                        "term": publisher.term,
                        "label": 0,
                        "attempt": 1,
                        "transport": Transport.SHM,
                        "manifest": (t.TensorSpec(name="x", dtype="float32", shape=(1,)),),
                    }
                    | change
                )
            )
