"""Weights over NCCL from a trainer's GPU to those of a launched SGLang and of one known by its URL.

    pytest on GPU 0: Publisher -- nccl --> router --> "launched" on GPU 1
                                             |
                                             +------> URL alone on GPU 2

The tests share a run and its engines, and stand in the order in which they run.
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
from milepost.types import EngineState, Transport
from stack import until

pytestmark = [pytest.mark.gpu(3), pytest.mark.timeout(400)]

FAST = {"sampling_backend": "pytorch", "disable_cuda_graph": True, "disable_radix_cache": True}


@pytest.fixture(scope="module")
def fleet(start_fleet: Any) -> Fleet:
    """Both engines, each on a GPU of its own."""
    return start_fleet(bare={**FAST, "base_gpu_id": 2}, base_gpu_id=1, **FAST)


@pytest.fixture
async def trainer(fleet: Fleet, gpu_model: Path) -> Trainer:
    """The next trainer of the one run that the engines work for."""
    return await Trainer.next(gpu_model, fleet)


async def test_one_group_of_a_launched_engine_and_one_known_by_its_url_serves_many_versions(
    fleet, trainer, out, tmp_path
):
    async def both() -> Any:
        found = await all_engines(fleet)
        return found if [e.state for e in found.values()] == [EngineState.STALE] * 2 else None

    found = await until("both are STALE", both, within_s=180)
    launched = found["launched"].capabilities
    assert Transport.NCCL in launched.transports
    assert launched.restartable
    async with trainer.publisher("nccl") as publisher:
        assert launched.nccl_version in ("", trainer.way.nccl_version)
        groups: set[str] = set()
        for seed in range(6):
            trainer.perturb(seed)
            published = await publish(publisher, trainer)
            groups.add(trainer.way.group_name)
            found = await all_engines(fleet)
            assert {(e.state, e.weight_version) for e in found.values()} == {
                (EngineState.SERVING, published.version)
            }
            seen: set[str] = set()
            while len(seen) < 2:
                replies = await asyncio.gather(
                    *(generate(trainer, version=published.version) for _ in "1234")
                )
                for reply, headers in replies:
                    matches(trainer, reply)
                    seen.add(headers["x-milepost-engine"])
    assert len(groups) == 1, "the group outlives its transaction"
    over_nccl = await checksum(fleet.bare_url)
    assert await checksum(found["launched"].url) == over_nccl
    save_file({n: x.cpu() for n, x in trainer.held.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    async with httpx.AsyncClient(timeout=60) as http:
        body = {"model_path": str(tmp_path), "load_format": "auto", "flush_cache": False}
        assert (await http.post(fleet.bare_url + "/update_weights_from_disk", json=body)).status_code == 200
    assert await checksum(fleet.bare_url) == over_nccl, "the bytes that a folder would have brought"
    (out / "nccl-tiny.json").write_text(json.dumps({"publish_s": trainer.seconds}))


async def checksum(url: str) -> str:
    """Of an engine's weights."""
    async with httpx.AsyncClient(timeout=30) as http:
        reply = (await http.post(url + "/weights_checker", json={"action": "checksum"})).json()
    return reply["ranks"][0]["per_gpu_checksum"]


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_a_request_in_flight_goes_on_under_weights_that_came_over_nccl(fleet, trainer, mode):
    """A new trainer: its group takes the place of the one of a trainer that is gone."""
    async with trainer.publisher("nccl", pause_mode=mode) as publisher:
        running = asyncio.create_task(generate(trainer, tokens=1500))

        async def in_flight() -> bool:
            return any(e.in_flight for e in (await all_engines(fleet)).values())

        await until("it runs", in_flight, within_s=20)
        trainer.perturb(12 if mode == "retract" else 13)
        published = await publish(publisher, trainer)
        reply, headers = await running
    assert len(reply["output_ids"]) == 1500
    assert headers["x-milepost-version-end"] == str(published.version)
    assert int(headers["x-milepost-version-start"]) < published.version
    if mode == "retract":
        matches(trainer, reply, last=100)
    fresh, _ = await generate(trainer, version=published.version)
    matches(trainer, fresh)


async def test_an_engine_that_comes_back_is_given_the_weights_without_a_new_step(fleet, trainer):
    trainer.perturb(21)
    async with trainer.publisher("nccl") as publisher:
        published = await publish(publisher, trainer)
        before = (await all_engines(fleet))["launched"]
        os.kill(fleet.launched.server(), signal.SIGKILL)

        async def served_again() -> Any:
            now = (await all_engines(fleet)).get("launched")
            with contextlib.suppress(TimeoutError):
                await publisher.catch_up()
            fresh = now is not None and now.instance_id != before.instance_id
            return now if fresh and now.state is EngineState.SERVING else None

        engine = await until("the engine serves again", served_again, within_s=200)
        assert engine.weight_version == publisher.published.version
        assert publisher.published.label == published.label
        trainer.perturb(22)
        published = await publish(publisher, trainer)
        states = {(e.state, e.weight_version) for e in (await all_engines(fleet)).values()}
        assert states == {(EngineState.SERVING, published.version)}
        reply, _ = await generate(trainer, version=published.version)
        matches(trainer, reply)
