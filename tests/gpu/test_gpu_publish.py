"""Weights from a trainer's publisher to SGLang through a real router: one engine launched, one known by URL.

pytest: Publisher -- cuda_ipc, disk --> router --> "launched" (registers itself, dies, comes back)
                                             \\--> URL alone   (no cuda_ipc: nobody named its GPU)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from launched import Launched, group_of
from milepost import BufferClient, RouterClient
from milepost.types import Engine, EngineState
from milepost_trainer.buckets import plan_buckets, read_bucket
from milepost_trainer.publisher import Published, Publisher
from milepost_trainer.settings import PublishSettings
from milepost_trainer.transports.build import build_transport
from stack import until

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(600)]

PROMPT = [3, 4, 12, 5, 13]
TOLERANCE = 5e-2


@dataclass
class Fleet:
    """What runs, and where."""

    launched: Launched
    bare_url: str
    buffer: str
    grpc: str
    http: str
    run_id: str
    label: int = -1
    published: Published = field(default_factory=Published)


@pytest.fixture(scope="module")
def fleet(launch_sglang: Any, launch_bare: Any, service: Any, tmp_path_factory: Any) -> Fleet:
    """A buffer, a router, and both engines."""
    _, url = launch_bare("bare")
    data = tmp_path_factory.mktemp("redis")
    buffer = service("milepost_buffer", "--listen", "127.0.0.1:0", "--data_dir", str(data))
    buffer_at = buffer.address(buffer.ready(), "grpc")
    listen = ("--listen", "127.0.0.1:0", "--http_listen", "127.0.0.1:0")
    router = service("milepost_router", *listen, "--buffer", buffer_at, "--engines", url)
    line = router.ready()
    grpc, http = router.address(line, "grpc"), "http://" + router.address(line, "http")
    launched = launch_sglang("launched", "--router", grpc, "--engine-id", "launched")
    assert launched.ready(), launched.log.read_text()[-5000:]
    return Fleet(launched, url, buffer_at, grpc, http, f"gpu-{uuid.uuid4().hex[:8]}")


class Trainer:
    """The publishing half of a trainer: weights on the GPU, and the publisher."""

    def __init__(self, model: Path, term: int, fleet: Fleet) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.run_id, self.term, self.fleet = fleet.run_id, term, fleet
        self.held: dict[str, torch.Tensor] = {}
        self.seconds: list[float] = []

    def perturb(self, seed: int) -> None:
        """New weights, which bfloat16 can hold."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                noise = 0.05 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_((parameter + noise).to(torch.bfloat16).float())
        self.held = {n: p.detach().to("cuda", torch.bfloat16) for n, p in self.model.named_parameters()}

    @asynccontextmanager
    async def publisher(self, transport: str, *, disk_dir: str = "weights") -> AsyncIterator[Publisher]:
        """A publisher by one transport, which watches the fleet."""
        settings = PublishSettings(
            transport=transport, bucket_bytes=100_000, disk_dir=disk_dir, timeout_s=60.0
        )  # type: ignore[arg-type]
        way = build_transport(settings, run_id=self.run_id)
        sizes = [(name, "bfloat16", tuple(x.shape)) for name, x in self.held.items()]
        buckets = plan_buckets(sizes, bucket_bytes=1 << 62 if way.single_bucket else settings.bucket_bytes)
        assert way.single_bucket or len(buckets) > 1

        async def gather(bucket: Any) -> torch.Tensor:
            flat = torch.empty(bucket.size_bytes, dtype=torch.uint8, device="cuda")
            for name, place in read_bucket(bucket, flat).items():
                place.copy_(self.held[name])
            return flat

        async with RouterClient(self.fleet.grpc) as router:
            publisher = Publisher(
                router, transport=way, buckets=buckets, gather=gather, settings=settings, run_id=self.run_id
            )
            watching = asyncio.create_task(publisher.watch())
            try:
                yield publisher
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
                await way.shut_down()

    def logprobs(self, output: list[int]) -> list[float]:
        """What a plain forward pass says of an output."""
        with torch.no_grad():
            tokens = torch.tensor([PROMPT + output])
            logits = self.model(tokens, use_cache=False).logits[0, len(PROMPT) - 1 : -1].double()
        return logits.log_softmax(-1).gather(1, tokens[0, len(PROMPT) :, None])[:, 0].tolist()


@pytest.fixture
async def trainer(fleet: Fleet, gpu_model: Path) -> Trainer:
    """The next trainer of the one run that the engines work for."""
    async with BufferClient(fleet.buffer) as buffer:
        await buffer.create_run(fleet.run_id)
        term = (await buffer.resume_consumer(fleet.run_id)).term
    return Trainer(gpu_model, term, fleet)


async def _engines(fleet: Fleet) -> dict[str, Engine]:
    async with RouterClient(fleet.grpc) as router:
        return {e.engine_id: e for e in (await router.list_engines()).engines}


async def _published(publisher: Publisher, trainer: Trainer) -> Published:
    """Publishes the weights that the trainer holds under the next label."""
    fleet = trainer.fleet
    fleet.label += 1
    publisher.start(term=trainer.term, label=fleet.label, published=fleet.published)

    async def done() -> bool:
        start = time.perf_counter()
        if await publisher.catch_up():
            trainer.seconds.append(time.perf_counter() - start)
        return publisher.published.label == fleet.label

    await until(f"label {fleet.label} is published", done, within_s=60)
    fleet.published = publisher.published
    return fleet.published


async def _generate(trainer: Trainer, *, tokens: int = 24, version: int | None = None) -> tuple[Any, Any]:
    headers = {"x-milepost-run": trainer.run_id}
    if version is not None:
        headers["x-milepost-version"] = str(version)
    sampling = {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}
    async with httpx.AsyncClient(timeout=60) as http:
        reply = await http.post(trainer.fleet.http + "/generate", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json(), reply.headers


async def _sum(url: str) -> str:
    async with httpx.AsyncClient(timeout=30) as http:
        reply = (await http.post(url + "/weights_checker", json={"action": "checksum"})).json()
    return reply["ranks"][0]["per_gpu_checksum"]


def _matches(trainer: Trainer, reply: Any, *, last: int = 0) -> None:
    got = [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]
    expected = trainer.logprobs(reply["output_ids"])
    assert got[-last:] == pytest.approx(expected[-last:], abs=TOLERANCE)


async def test_weights_go_by_cuda_ipc_where_the_gpu_is_shared_and_by_disk_elsewhere(
    fleet, trainer, tmp_path, out
):
    engines = await until("both are there", lambda: _all_stale(fleet), within_s=180)
    names = {t.name for t in engines["launched"].capabilities.transports}
    assert "CUDA_IPC" in names, engines["launched"]
    bare = next(e for e in engines.values() if e.url == fleet.bare_url)
    assert "CUDA_IPC" not in {t.name for t in bare.capabilities.transports}
    assert bare.capabilities.engine.startswith("sglang ")

    trainer.perturb(1)
    async with trainer.publisher("cuda_ipc") as publisher:
        first = await _published(publisher, trainer)
        engines = await _engines(fleet)
        assert engines["launched"].state is EngineState.SERVING
        assert engines["launched"].weight_version == first.version
        assert engines[bare.engine_id].state is EngineState.STALE
        reply, headers = await _generate(trainer)
        assert headers["x-milepost-version-start"] == headers["x-milepost-version-end"] == str(first.version)
        assert headers["x-milepost-engine"] == "launched"
        _matches(trainer, reply)

        running = asyncio.create_task(_generate(trainer, tokens=1500))
        await until("it runs", lambda: _in_flight(fleet), within_s=20)
        trainer.perturb(2)
        second = await _published(publisher, trainer)
        long, headers = await running
        assert len(long["output_ids"]) == 1500
        assert headers["x-milepost-version-end"] == str(second.version)
        _matches(trainer, long, last=100)
        for _ in range(6):
            await _published(publisher, trainer)

    async with trainer.publisher("disk", disk_dir=str(tmp_path)) as publisher:
        third = await _published(publisher, trainer)
        engines = await _engines(fleet)
        assert {e.state for e in engines.values()} == {EngineState.SERVING}
        assert {e.weight_version for e in engines.values()} == {third.version}
    by_disk = await _sum(fleet.bare_url)
    trainer.perturb(3)
    async with trainer.publisher("cuda_ipc") as publisher:
        await _published(publisher, trainer)
        by_ipc = await _sum(engines["launched"].url)
    assert by_ipc != by_disk
    whole = tmp_path / "by-disk"
    whole.mkdir()
    save_file({n: x.cpu() for n, x in trainer.held.items()}, whole / "model.safetensors", {"format": "pt"})
    async with httpx.AsyncClient(timeout=60) as http:
        body = {"model_path": str(whole), "load_format": "auto", "flush_cache": False}
        assert (await http.post(fleet.bare_url + "/update_weights_from_disk", json=body)).status_code == 200
    assert await _sum(fleet.bare_url) == by_ipc, "the same weights by both ways"
    (out / "publish.json").write_text(json.dumps({"publish_s": trainer.seconds}))


async def _all_stale(fleet: Fleet) -> Any:
    engines = await _engines(fleet)
    return (
        engines if len(engines) == 2 and {e.state for e in engines.values()} == {EngineState.STALE} else None
    )


async def _in_flight(fleet: Fleet) -> bool:
    return (await _engines(fleet))["launched"].in_flight > 0


async def test_a_killed_sglang_comes_back_stale_and_is_given_the_weights_again(fleet, trainer):
    trainer.perturb(4)
    async with trainer.publisher("cuda_ipc") as publisher:
        first = await _published(publisher, trainer)
        before = (await _engines(fleet))["launched"]
        server = fleet.launched.server()
        tree = group_of(server)
        assert len(tree) >= 3, "the server, its scheduler and its detokenizer"
        os.kill(server, signal.SIGKILL)

        async def gone() -> bool:
            return not set(tree) & set(group_of(server))

        await until("its whole tree is gone", gone, within_s=30)

        async def served_again() -> bool:
            now = (await _engines(fleet)).get("launched")
            if now is None or now.instance_id == before.instance_id:
                return False
            with contextlib.suppress(TimeoutError):
                await publisher.catch_up()
            return now.state is EngineState.SERVING

        await until("the engine serves again", served_again, within_s=240)
        engine = (await _engines(fleet))["launched"]
        assert engine.weight_version == publisher.published.version >= first.version
        reply, _ = await _generate(trainer)
        _matches(trainer, reply)


async def test_sigterm_drains_and_leaves_nothing_on_the_gpu(fleet):
    group = fleet.launched.server()
    assert group_of(group)
    fleet.launched.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(fleet.launched.process.wait, 30) == 0
    assert group_of(group) == []
    assert "launched" not in await _engines(fleet)
