"""Weights from a trainer's publisher to SGLang through a real router: one engine launched, one known by URL.

    pytest: Publisher -- cuda_ipc, disk --> router --> "launched" (registers itself, dies, comes back)
                                              |
                                              +------> URL alone (no cuda_ipc: nobody named its GPU)

The tests share one run and its engines, and stand in the order in which they run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import save_file

from gpu_trainer import Fleet, Trainer, all_engines, generate, matches, publish
from launched import group_of
from milepost.types import EngineState, Transport
from stack import until

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def fleet(start_fleet: Any) -> Fleet:
    """Both engines."""
    return start_fleet(bare=True)


@pytest.fixture
async def trainer(fleet: Fleet, gpu_model: Path) -> Trainer:
    """The next trainer of the one run that the engines work for."""
    return await Trainer.next(gpu_model, fleet)


async def test_engines_join_by_url_alone_and_by_their_launcher(fleet):
    async def both() -> Any:
        found = await all_engines(fleet)
        return found if [e.state for e in found.values()] == [EngineState.STALE] * 2 else None

    found = await until("both are STALE", both, within_s=180)
    launched = found.pop("launched").capabilities
    bare = found.popitem()[1].capabilities
    assert launched.engine == bare.engine
    assert launched.engine.startswith("sglang ")
    assert len(launched.gpu_uuids) == 1
    assert set(launched.transports) - set(bare.transports) == {Transport.CUDA_IPC}


async def test_weights_go_by_cuda_ipc_to_the_engine_on_the_same_gpu(fleet, trainer):
    trainer.perturb(1)
    async with trainer.publisher("cuda_ipc") as publisher:
        published = await publish(publisher, trainer)
    found = await all_engines(fleet)
    assert found.pop("launched").weight_version == published.version
    assert found.popitem()[1].state is EngineState.STALE
    reply, headers = await generate(trainer)
    assert headers["x-milepost-engine"] == "launched"
    assert headers["x-milepost-version-start"] == headers["x-milepost-version-end"] == str(published.version)
    matches(trainer, reply)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_a_request_in_flight_goes_on_under_the_new_weights(fleet, trainer, mode):
    """Retracted, it is computed again under the new weights; in place, its cache stays that of the old."""
    async with trainer.publisher("cuda_ipc", pause_mode=mode) as publisher:
        running = asyncio.create_task(generate(trainer, tokens=1500))
        await until("it runs", lambda: _in_flight(fleet), within_s=20)
        trainer.perturb(2 if mode == "retract" else 3)
        published = await publish(publisher, trainer)
        reply, headers = await running
    assert len(reply["output_ids"]) == 1500
    assert headers["x-milepost-version-end"] == str(published.version)
    assert int(headers["x-milepost-version-start"]) < published.version
    if mode == "retract":
        matches(trainer, reply, last=100)
    fresh, _ = await generate(trainer)
    matches(trainer, fresh)


async def _in_flight(fleet: Fleet) -> bool:
    return (await all_engines(fleet))["launched"].in_flight > 0


async def test_disk_reaches_both_and_leaves_the_bytes_that_cuda_ipc_leaves(fleet, trainer, tmp_path, out):
    trainer.perturb(4)
    async with trainer.publisher("disk", disk_dir=str(tmp_path)) as publisher:
        published = await publish(publisher, trainer)
    found = await all_engines(fleet)
    assert {(e.state, e.weight_version) for e in found.values()} == {(EngineState.SERVING, published.version)}
    trainer.perturb(5)
    async with trainer.publisher("cuda_ipc") as publisher:
        for _ in range(6):
            await publish(publisher, trainer)
    by_ipc = await _sum(found["launched"].url)
    assert await _sum(fleet.bare_url) != by_ipc
    save_file({n: x.cpu() for n, x in trainer.held.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    async with httpx.AsyncClient(timeout=60) as http:
        body = {"model_path": str(tmp_path), "load_format": "auto", "flush_cache": False}
        assert (await http.post(fleet.bare_url + "/update_weights_from_disk", json=body)).status_code == 200
    assert await _sum(fleet.bare_url) == by_ipc
    (out / "publish-tiny.json").write_text(json.dumps({"publish_s": trainer.seconds}))


async def _sum(url: str) -> str:
    async with httpx.AsyncClient(timeout=30) as http:
        reply = (await http.post(url + "/weights_checker", json={"action": "checksum"})).json()
    return reply["ranks"][0]["per_gpu_checksum"]


async def test_a_killed_sglang_comes_back_stale_and_is_given_the_weights_again(fleet, trainer):
    trainer.perturb(6)
    async with trainer.publisher("cuda_ipc") as publisher:
        await publish(publisher, trainer)
        before = (await all_engines(fleet))["launched"]
        server = fleet.launched.server()
        tree = group_of(server)
        assert len(tree) >= 3, "the server, its scheduler and its detokenizer"
        os.kill(server, signal.SIGKILL)

        async def gone() -> bool:
            return not set(tree) & set(group_of(server))

        await until("its whole tree is gone", gone, within_s=30)

        async def served_again() -> Any:
            now = (await all_engines(fleet)).get("launched")
            if now is None or now.instance_id == before.instance_id:
                return None
            with contextlib.suppress(TimeoutError):
                await publisher.catch_up()
            return now if now.state is EngineState.SERVING else None

        engine = await until("the engine serves again", served_again, within_s=240)
        assert engine.weight_version == publisher.published.version
    reply, headers = await generate(trainer, version=engine.weight_version)
    assert headers["x-milepost-engine"] == "launched"
    matches(trainer, reply)


async def test_sigterm_lets_requests_end_and_leaves_nothing_on_the_gpu(fleet, trainer):
    group = fleet.launched.server()
    assert group_of(group)
    running = asyncio.create_task(generate(trainer, tokens=400))
    await until("it runs", lambda: _in_flight(fleet), within_s=20)
    fleet.launched.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(fleet.launched.process.wait, 30) == 0
    reply, _ = await running
    assert len(reply["output_ids"]) == 400
    assert group_of(group) == []
    assert "launched" not in await all_engines(fleet)
