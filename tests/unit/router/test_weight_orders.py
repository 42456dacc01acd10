"""Engines with our own loader of weights: one order for all of it, and a report that must say it was done."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from milepost import errors
from milepost import types as t
from milepost.types import Transport
from milepost_router.probe import WEIGHT_HOOK, capabilities_of

INFO = {"version": "0.5.17", "tp_size": 1}


class Loader:
    """The hook's side of a fake engine: what its report says, and how often it was asked."""

    def __init__(self, fake: Any, *, message: str = "", transaction: str = "") -> None:
        self.message, self.transaction = message, transaction
        self.done = ""
        fake.reactions["update_weights_from_tensor"] = self._load
        fake.reactions["get_weights_by_name"] = self._report

    async def _load(self, request: web.Request, body: Any) -> None:
        self.done = json.loads(body["serialized_named_tensors"][0])["transaction"]

    async def _report(self, request: web.Request, body: Any) -> web.Response:
        assert body["name"] == "milepost.report"
        said = {"transaction": self.transaction or self.done, "ok": not self.message, "message": self.message}
        return web.json_response([float(byte) for byte in json.dumps(said).encode()])


def order(prepared: t.Prepared, **changes: Any) -> t.BucketHeader:
    """All weights at once, for each member's loader."""
    text = json.dumps({"transaction": prepared.transaction_id}).encode()
    handles = tuple(
        t.HandlesOfEngine(engine_id=m.engine_id, handles=(text,), load_format=m.weight_hook)
        for m in prepared.members
    )
    given: dict[str, Any] = {
        "transaction_id": prepared.transaction_id,
        "fleet_epoch": prepared.fleet_epoch,
        "bucket_index": 0,
        "handles": handles,
        "size_bytes": 16,
        "whole": True,
    }
    return t.BucketHeader(**(given | changes))


@pytest.fixture
async def bench(tools: Any, fake_engine: Any) -> AsyncIterator[Any]:
    """Two engines on one GPU that were launched with our hook; nobody compares checksums."""
    made = tools.bench(verify_checksum=False)
    for name in ("a", "b"):
        made.join(
            await fake_engine(name),
            engine="sglang 0.5.17",
            update_session=False,
            transports=(Transport.CUDA_IPC,),
            gpu_uuids=("GPU-1",),
            weight_hook=WEIGHT_HOOK,
        )
        made.record(name).caches_prefixes = False
    yield made
    await made.transactions.close()
    made.pool.close()


async def prepare(bench: Any, tools: Any, **changes: Any) -> t.Prepared:
    return await bench.transactions.prepare(tools.request(transport=Transport.CUDA_IPC, **changes))


def test_a_server_says_itself_that_it_has_our_loader():
    assert capabilities_of(INFO | {"custom_weight_loader": ["x", WEIGHT_HOOK]}).weight_hook == WEIGHT_HOOK
    assert capabilities_of(INFO | {"custom_weight_loader": None}).weight_hook == ""
    assert capabilities_of(INFO).weight_hook == ""


async def test_an_engine_at_rest_is_marked_loaded_and_named_and_nothing_else(bench, tools):
    for fake in bench.engines.values():
        Loader(fake)
    prepared = await prepare(bench, tools)
    assert [(m.weight_hook, m.instance_id) for m in prepared.members] == [(WEIGHT_HOOK, "i")] * 2
    transaction = bench.transactions.find(prepared.transaction_id)
    ack = await transaction.take(order(prepared))
    assert all(a.ok for a in ack.acks)
    committed = await tools.commit(bench, prepared, num_buckets=1)
    assert (committed.serving, committed.quarantined) == (("a", "b"), {})
    fake = bench.engines["a"]
    asked = [call for call in fake.calls if call != "get_weights_by_name"]
    assert asked == ["update_weight_version", "update_weights_from_tensor", "update_weight_version"]
    assert "GET /model_info" not in fake.looks
    [body] = fake.bodies["update_weights_from_tensor"]
    assert body["load_format"] == WEIGHT_HOOK
    assert (body["flush_cache"], body["abort_all_requests"]) == (False, False)
    assert [b["new_version"] for b in fake.bodies["update_weight_version"]] == [
        f"updating/{prepared.transaction_id}",
        "run/1/0",
    ]


@pytest.mark.parametrize("spans", [False, True])
async def test_an_engine_with_requests_is_paused_and_goes_on(spans: bool, bench, tools):
    for fake in bench.engines.values():
        Loader(fake)
    record = bench.record("a")
    record.capabilities = replace(record.capabilities, version_spans=spans)
    bench.fleet.request_started(record)
    prepared = await prepare(bench, tools)
    await bench.transactions.find(prepared.transaction_id).take(order(prepared))
    await tools.commit(bench, prepared, num_buckets=1)
    opening = ["update_weight_version", "pause_generation"]
    assert [call for call in bench.engines["a"].calls if call != "get_weights_by_name"] == [
        *(reversed(opening) if spans else opening),
        "update_weights_from_tensor",
        "update_weight_version",
        "continue_generation",
    ]
    assert "pause_generation" not in bench.engines["b"].calls


@pytest.mark.parametrize(
    "says", [{"message": "out of memory"}, {"transaction": "another"}], ids=["failed", "restarted"]
)
async def test_an_engine_whose_loader_failed_is_quarantined_alone(bench, tools, says):
    Loader(bench.engines["a"], **says)
    Loader(bench.engines["b"])
    prepared = await prepare(bench, tools)
    ack = await bench.transactions.find(prepared.transaction_id).take(order(prepared))
    assert {a.engine_id: a.ok for a in ack.acks} == {"a": False, "b": True}
    assert says.get("message", "it restarted") in ack.acks[0].message
    committed = await tools.commit(bench, prepared, num_buckets=1)
    assert committed.serving == ("b",)
    assert bench.states() == {"a": "QUARANTINED", "b": "SERVING"}


@pytest.mark.parametrize("step", ["update_weight_version", "pause_generation"])
async def test_an_engine_that_is_silent_before_its_order_costs_the_others_one_call(
    step: str, tools, fake_engine
):
    bench = tools.bench(verify_checksum=False, bucket_timeout_s=3600.0, call_timeout_s=0.3)
    for name in ("a", "b"):
        fake = await fake_engine(name)
        Loader(fake)
        bench.join(
            fake, engine="sglang 0.5.17", update_session=False, version_spans=False, weight_hook=WEIGHT_HOOK
        )
        bench.fleet.request_started(bench.record(name))
    bench.engines["a"].hang(step)
    try:
        prepared = await prepare(bench, tools)
        async with asyncio.timeout(60):
            ack = await bench.transactions.find(prepared.transaction_id).take(order(prepared))
        assert {a.engine_id: a.ok for a in ack.acks} == {"a": False, "b": True}
        assert "no answer within 0.3 s" in ack.acks[0].message
        assert (await tools.commit(bench, prepared, num_buckets=1)).serving == ("b",)
        assert bench.states() == {"a": "QUARANTINED", "b": "SERVING"}
    finally:
        await bench.transactions.close()
        bench.pool.close()


async def test_an_engine_that_gives_no_report_has_failed(bench, tools):
    Loader(bench.engines["b"])
    prepared = await prepare(bench, tools)
    ack = await bench.transactions.find(prepared.transaction_id).take(order(prepared))
    assert {a.engine_id: a.ok for a in ack.acks} == {"a": False, "b": True}


async def test_checksums_are_compared_where_that_is_asked_for(tools, fake_engine):
    bench = tools.bench()
    for name, checksum in (("a", "one"), ("b", "other")):
        fake = await fake_engine(name)
        fake.checksum = checksum
        Loader(fake)
        able = (Transport.CUDA_IPC,)
        bench.join(
            fake, engine="sglang 0.5.17", update_session=False, transports=able, weight_hook=WEIGHT_HOOK
        )
    try:
        prepared = await prepare(bench, tools)
        await bench.transactions.find(prepared.transaction_id).take(order(prepared))
        with pytest.raises(errors.DataLoss):
            await tools.commit(bench, prepared, num_buckets=1)
    finally:
        await bench.transactions.close()
        bench.pool.close()


@pytest.mark.parametrize(
    "changes", [{"bucket_index": 1}, {"tensors": (t.TensorSpec(name="w0", dtype="float32", shape=(2,)),)}]
)
async def test_a_whole_model_is_one_bucket_without_tensors(bench, tools, changes):
    prepared = await prepare(bench, tools)
    with pytest.raises(errors.InvalidArgument):
        await bench.transactions.find(prepared.transaction_id).take(order(prepared, **changes))
    assert all(not fake.calls for fake in bench.engines.values())
