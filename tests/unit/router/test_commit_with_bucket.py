"""A commit that comes with the only bucket: over a real socket, for weights that are shared and pushed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import orjson
import pytest
from aiohttp import web

from milepost import RouterClient, errors
from milepost import types as t
from milepost.types import Transport
from milepost.v1 import router_pb2_grpc
from milepost_common.server import GrpcServer
from milepost_router.probe import WEIGHT_HOOK
from milepost_router.servicer import RouterServicer
from milepost_router.signals import Signal

DEADLINE_S = 30.0
WAYS = {
    "shared": {"transport": Transport.CUDA_IPC},
    "pushed": {"transport": Transport.NCCL, "master_address": "127.0.0.1", "master_port": 1234},
}


@pytest.fixture
async def bench(tools: Any, fake_engine: Any) -> AsyncIterator[Any]:
    """Transactions over two engines that were launched with our hook."""
    made = tools.bench(verify_checksum=False)
    for name in ("a", "b"):
        made.join(
            await fake_engine(name),
            engine="sglang 0.5.17",
            update_session=False,
            version_spans=False,
            transports=(Transport.CUDA_IPC, Transport.NCCL),
            gpu_uuids=("GPU-1",),
            weight_hook=WEIGHT_HOOK,
            restartable=True,
        )
    yield made
    await made.transactions.close()
    made.pool.close()


@pytest.fixture
async def router(bench: Any) -> AsyncIterator[RouterClient]:
    """A client of a server of these transactions."""
    nobody: Any = None
    servicer = RouterServicer(
        bench.fleet, bench.transactions, nobody, Signal(), memory=nobody, heartbeat_interval_s=1.0
    )
    async with GrpcServer(listen="127.0.0.1:0") as server:
        add = router_pb2_grpc.add_RouterServiceServicer_to_server
        server.add(add, servicer, "milepost.v1.RouterService")
        await server.start()
        async with RouterClient(server.address) as client:
            yield client
        servicer.stop()


@pytest.fixture(params=WAYS)
async def prepared(request: pytest.FixtureRequest, bench: Any, tools: Any) -> t.Prepared:
    """A transaction either way; each engine's loader reports that it has all of it."""
    prepared = await bench.transactions.prepare(tools.request(**WAYS[request.param]))
    report(bench, prepared, "a", "b")
    return prepared


def report(bench: Any, prepared: t.Prepared, *names: str, **changes: Any) -> None:
    """What loaders say of the transaction."""
    said = orjson.dumps({"transaction": prepared.transaction_id, "ok": True, "message": ""} | changes)

    async def answer(request: web.Request, body: Any) -> web.Response:
        return web.json_response([float(byte) for byte in said])

    for name in names:
        bench.engines[name].reactions["get_weights_by_name"] = answer


async def sent(router: RouterClient, prepared: t.Prepared, *, commit: bool = True) -> t.BucketAck:
    """The acknowledgement of all weights in one bucket."""
    header = t.BucketHeader(
        transaction_id=prepared.transaction_id,
        fleet_epoch=prepared.fleet_epoch,
        bucket_index=0,
        handles=tuple(
            t.HandlesOfEngine(engine_id=m.engine_id, handles=(b"order",), load_format=WEIGHT_HOOK)
            for m in prepared.members
        ),
        size_bytes=16,
        whole=True,
        commit=commit,
    )

    async def headers() -> AsyncIterator[t.BucketHeader]:
        yield header

    stream: Any = router.update_weights(headers(), timeout_s=DEADLINE_S)
    async with asyncio.timeout(DEADLINE_S), aclosing(stream) as acks:
        return await anext(acks)


async def test_its_acknowledgement_says_what_became_of_the_commit(bench, router, prepared, tools):
    ack = await sent(router, prepared)
    assert [a.ok for a in ack.acks] == [True, True]
    assert ack.committed is not None
    assert (ack.committed.version, ack.committed.serving) == (1, ("a", "b"))
    assert bench.states() == {"a": "SERVING", "b": "SERVING"}
    assert await tools.commit(bench, prepared, num_buckets=1) == ack.committed, "asked again it is the same"


async def test_without_it_the_transaction_waits_for_one(bench, router, prepared, tools):
    ack = await sent(router, prepared, commit=False)
    assert ack.committed is None
    assert "SERVING" not in bench.states().values()
    assert (await tools.commit(bench, prepared, num_buckets=1)).serving == ("a", "b")


async def test_weights_that_nobody_took_are_not_committed(bench, router, prepared):
    report(bench, prepared, "a", "b", ok=False, message="not all of them came")
    ack = await sent(router, prepared)
    assert ack.committed is None
    assert all("not all of them came" in a.message for a in ack.acks)
    assert bench.ledger.published == []
    assert "SERVING" not in bench.states().values()


async def test_a_refusal_of_the_ledger_ends_the_stream(bench, router, prepared):
    bench.ledger.refusal = errors.StaleTerm("term 1 is over")
    with pytest.raises(errors.StaleTerm, match="term 1 is over"):
        await sent(router, prepared)
    assert bench.states() == {"a": "STALE", "b": "STALE"}
