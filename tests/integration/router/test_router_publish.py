"""Weights reach real engines through a real router and ledger, by every transport."""

from __future__ import annotations

import aiohttp
import pytest

from milepost import errors
from milepost import types as t
from milepost.types import EngineState, Transport


async def model_info(url: str) -> dict:
    async with aiohttp.ClientSession() as session, session.get(url + "/model_info") as reply:
        return await reply.json()


@pytest.mark.parametrize("transport", [Transport.SHM, Transport.DISK, Transport.GLOO])
async def test_published_weights_are_served(
    helpers, engines, buffer, start_router, publisher_of, run_id, transport
):
    router = start_router(*(e.url for e in engines), buffer=buffer)
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
    assert len(set(committed.checksums.values())) == 1
    known = await publisher.weights.get_version(run_id)
    assert (known.version, known.label) == (committed.version, 0)
    for engine in engines:
        assert (await model_info(engine.url))["weight_version"] == f"{run_id}/{committed.version}/0"
    answer = await helpers.generate(
        router.http, headers={"x-milepost-run": run_id, "x-milepost-min-version": str(committed.version)}
    )
    assert answer.status == 200
    assert len(answer.body["output_ids"]) == 4
    assert answer.headers["x-milepost-version-start"] == str(committed.version)
    assert answer.headers["x-milepost-version-end"] == str(committed.version)
    assert answer.headers["x-milepost-engine"] in committed.serving
