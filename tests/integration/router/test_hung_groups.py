"""Process groups over their whole life: real engines under real launchers, and the trainer's publisher.

    pytest: Publisher -- gloo --> router --> three launchers --> an engine each; only its launcher restarts it

What NCCL and SGLang add to it, GPUs, is tested in tests/gpu.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from launched import DRIVER, Launched, free_port, runs
from milepost import BufferClient, RouterClient
from milepost.types import EngineState
from milepost_trainer.buckets import Bucket, plan_buckets, read_bucket
from milepost_trainer.publisher import Published, Publisher
from milepost_trainer.settings import PublishSettings
from milepost_trainer.transports.gloo import GlooTransport
from stack import until

pytestmark = pytest.mark.timeout(600)

NAMES = ("e0", "e1", "e2")
VICTIM = "e1"
TIMEOUT_S = 30.0
BUCKET_BYTES = 1 << 22


def make_model(seed: int) -> Qwen3ForCausalLM:
    """One matrix of it is larger than what sockets hold, so that its broadcast waits for every reader."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=32768,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What engines start with."""
    path = tmp_path_factory.mktemp("groups") / "model"
    make_model(0).save_pretrained(path)
    return path


@pytest.fixture
def launch(model: Path, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts launchers; does not wait for their engines."""
    started: list[Launched] = []

    def start(name: str, *flags: str) -> Launched:
        port = free_port()
        argv = ["-c", DRIVER, port, "--model", str(model), "--port", port, "--engine-id", name, *flags]
        launched = Launched(tmp_path / f"{name}.log", *argv)
        started.append(launched)
        return launched

    yield start
    for each in started:
        each.end()
        each.process.wait(timeout=40)


class KillingTransport(GlooTransport):
    """Kills a process while the largest bucket is on its way to it, once.

    Attributes:
      victim: its process id; 0: nobody.
      killed: it did.
    """

    victim = 0
    killed = False

    async def _broadcast(self, group: Any, flat: torch.Tensor) -> None:
        victim, self.victim = (self.victim, 0) if flat.numel() > BUCKET_BYTES else (0, self.victim)
        if victim:
            os.kill(victim, signal.SIGSTOP)  # it takes no more of it than its sockets hold
        sending = asyncio.create_task(super()._broadcast(group, flat))
        if victim:
            await until("the router has told all members", told, within_s=60)
            assert not sending.done()
            os.kill(victim, signal.SIGKILL)
            self.killed = True
        await sending


async def told() -> bool:
    """The router, which runs in this process, calls all engines at once; the victim's call does not end."""
    return VICTIM in {task.get_name() for task in asyncio.all_tasks()}


class Trainer:
    """The publishing half of a trainer."""

    def __init__(self, router: str, run_id: str, term: int) -> None:
        self._router, self.run_id, self.term = router, run_id, term
        self.transport = KillingTransport(master_address="127.0.0.1")
        self.state: dict[str, torch.Tensor] = {}
        self.take(0)

    def take(self, seed: int) -> None:
        """Other weights."""
        named = [*make_model(seed).named_parameters()]
        self.state = {name: p.detach() for name, p in reversed(named)}  # the largest last

    async def _gather(self, bucket: Bucket) -> torch.Tensor:
        flat = torch.empty(bucket.size_bytes, dtype=torch.uint8)
        for name, place in read_bucket(bucket, flat).items():
            place.copy_(self.state[name])
        return flat

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        """Its publisher, which watches the fleet."""
        sizes = [(name, "float32", tuple(x.shape)) for name, x in self.state.items()]
        async with RouterClient(self._router) as router:
            publisher = Publisher(
                router,
                transport=self.transport,
                buckets=plan_buckets(sizes, bucket_bytes=BUCKET_BYTES),
                gather=self._gather,
                settings=PublishSettings(transport="gloo", timeout_s=TIMEOUT_S, retry_delay_s=0.2),
                run_id=self.run_id,
            )
            publisher.start(term=self.term, label=0, published=Published())
            watching = asyncio.create_task(publisher.watch())
            try:
                yield publisher
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
                await self.transport.shut_down()


@pytest.fixture
async def trainer(buffer: str, run_id: str, start_router: Any) -> tuple[Trainer, Any]:
    """A trainer and its router."""
    router = await start_router(buffer=buffer, heartbeat_interval_s=0.2, engine_call_timeout_s=10.0)
    async with BufferClient(buffer) as client:
        await client.create_run(run_id)
        term = (await client.resume_consumer(run_id)).term
    return Trainer(router.grpc, run_id, term), router


async def serve_everywhere(helpers: Any, client: RouterClient, publisher: Publisher, *names: str) -> Any:
    """Publishes until these engines, and no others, serve what is published."""

    async def check() -> Any:
        await publisher.catch_up()
        found = await helpers.states(client)
        version = publisher.published.version
        good = all(e.state is EngineState.SERVING and e.weight_version == version for e in found.values())
        return found if good and set(found) == set(names) and version else None

    return await helpers.until(f"{names} serve", check, within_s=240)


async def test_one_of_three_engines_is_killed_in_mid_broadcast(helpers, launch, trainer, run_id):
    trainer, router = trainer
    launched = {name: launch(name, "--router", router.grpc) for name in NAMES}
    assert all(each.ready() for each in launched.values())
    async with RouterClient(router.grpc) as client, trainer.publisher() as publisher:
        first = await serve_everywhere(helpers, client, publisher, *NAMES)
        servers = {name: each.server() for name, each in launched.items()}
        asked = [asyncio.create_task(ask(router.http, run_id)) for _ in NAMES]

        async def running() -> bool:
            return all(e.in_flight for e in (await helpers.states(client)).values())

        await helpers.until("requests run", running)
        trainer.take(1)
        publisher.moved_to(1, due=True)
        trainer.transport.victim = servers[VICTIM]
        begun = time.monotonic()
        assert not await publisher.catch_up()
        assert trainer.transport.killed
        assert time.monotonic() - begun < TIMEOUT_S, "the trainer is back before its deadline"
        again = await serve_everywhere(helpers, client, publisher, *NAMES)
        assert publisher.published.label == 1
        for name in NAMES:
            assert again[name].instance_id != first[name].instance_id
            assert not runs(servers[name])
            assert launched[name].server() != servers[name]
        assert set(await asyncio.gather(*asked)) <= {"unavailable", "abort"}, "each ended"
        versions = {"x-milepost-run": run_id, "x-milepost-version": str(publisher.published.version)}
        for _ in NAMES:
            assert (await helpers.generate(router.http, headers=versions)).status == 200
    assert sum("hangs in a process group" in each.log.read_text() for each in launched.values()) >= 2


async def test_a_group_lives_as_long_as_its_members_and_takes_in_who_comes(helpers, launch, trainer):
    trainer, router = trainer
    launched = launch("e0", "--router", router.grpc)
    assert launched.ready()
    async with RouterClient(router.grpc) as client, trainer.publisher() as publisher:
        await serve_everywhere(helpers, client, publisher, "e0")
        group = trainer.transport.group_name
        for label in (1, 2):
            trainer.take(label)
            publisher.moved_to(label, due=True)
            await serve_everywhere(helpers, client, publisher, "e0")
            assert trainer.transport.group_name == group, "used again"
        assert launch("e1", "--router", router.grpc).ready()
        before = publisher.published.version
        found = await serve_everywhere(helpers, client, publisher, "e0", "e1")
        assert found["e1"].weight_version == before, "the newcomer did not wait for the next step"
        trainer.take(3)
        publisher.moved_to(3, due=True)
        await serve_everywhere(helpers, client, publisher, "e0", "e1")
        assert trainer.transport.group_name not in ("", group)
        assert await sums(helpers, found) == 1, "both hold the same bytes"


async def ask(url: str, run_id: str) -> str:
    """A request that is still running when the weights come; returns how it ended."""
    sampling = {"max_new_tokens": 50_000, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": [3, 4], "sampling_params": sampling}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=400)) as session,
        session.post(url + "/generate", json=body, headers={"x-milepost-run": run_id}) as reply,
    ):
        said = await reply.json()
    if reply.status == 503:
        return "unavailable"
    assert reply.status == 200, said
    return said["meta_info"]["finish_reason"]["type"]


async def sums(helpers: Any, engines: dict[str, Any]) -> int:
    """How many different checksums engines have."""
    seen: set[str] = set()
    async with helpers.http_session() as session:
        for engine in engines.values():
            async with session.post(engine.url + "/weights_checker", json={"action": "checksum"}) as reply:
                seen.add((await reply.json())["ranks"][0]["per_gpu_checksum"])
    return len(seen)
