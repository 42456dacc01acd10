"""One NCCL group of a trainer and three engines at the shape of a real model: how fast, and one is killed.

    pytest on GPU 0: Publisher -- nccl --> router --> e1, e2, e3 on GPUs 1, 2, 3, each under its launcher

The tests share the engines, and stand in the order in which they run. MILEPOST_SHAPE is "8b" or "0.6b".
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import flat_broadcast
from gpu_trainer import PROMPT
from launched import Launched, free_port, group_of
from milepost import BufferClient, RouterClient
from milepost import types as t
from milepost.types import EngineState
from milepost_trainer.backends.gathering import Gathering
from milepost_trainer.buckets import Bucket, plan_buckets
from milepost_trainer.publisher import Published, Publisher
from milepost_trainer.settings import PublishSettings
from milepost_trainer.transports.nccl import NcclTransport
from milepost_trainer.world import World
from stack import until

pytestmark = pytest.mark.timeout(400)

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}
SHAPE = os.environ.get("MILEPOST_SHAPE", "8b")
TIMEOUT_S = 30.0
ROUNDS = 7
RUN_ID = "fleet"


class Resident:
    """Weights in bfloat16 on GPU 0, gathered as a trainer of one rank does it."""

    def __init__(self, config: Path, *, bucket_bytes: int) -> None:
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.model = AutoModelForCausalLM.from_config(
                Qwen3Config.from_pretrained(config), dtype=torch.bfloat16
            )
        named = dict(self.model.eval().named_parameters())
        sizes = [(name, "bfloat16", tuple(p.shape)) for name, p in named.items()]
        self.buckets = plan_buckets(sizes, bucket_bytes=bucket_bytes)
        self._gathering = Gathering(named, World(device=torch.device("cuda", 0)), resident=False)
        self.bytes = sum(b.size_bytes for b in self.buckets)

    async def gather(self, bucket: Bucket) -> torch.Tensor:
        """One bucket."""
        flat = await asyncio.to_thread(self._gathering.bucket, bucket)
        assert flat is not None
        return flat

    def another(self, seed: int) -> None:
        """Other weights, told apart by what they make likely."""
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            head = self.model.get_output_embeddings().weight
            head.normal_(0.0, 0.06, generator=generator)
        torch.cuda.synchronize()

    @torch.no_grad()
    def differences(self, reply: Any) -> list[float]:
        """Of an engine's log-probs and this model's."""
        output = reply["output_ids"]
        tokens = torch.tensor([PROMPT + output], device="cuda")
        logits = self.model(tokens, use_cache=False).logits[0, len(PROMPT) - 1 : -1].double()
        said = logits.log_softmax(-1).gather(1, tokens[0, len(PROMPT) :, None])[:, 0].tolist()
        got = [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]
        return [abs(a - b) for a, b in zip(said, got, strict=True)]


class Some(RouterClient):
    """A client that knows of some engines alone; without names of all."""

    names: tuple[str, ...] = ()

    async def watch_fleet(self, run_id: str = "", **more: Any) -> AsyncIterator[t.Fleet]:
        """Sees them."""
        async for fleet in super().watch_fleet(run_id, **more):
            chosen = tuple(e for e in fleet.engines if not self.names or e.engine_id in self.names)
            yield dataclasses.replace(fleet, engines=chosen)

    async def prepare_weights(self, request: t.PrepareRequest) -> t.Prepared:
        """Names them."""
        return await super().prepare_weights(dataclasses.replace(request, engine_ids=self.names))


class Killing(NcclTransport):
    """Kills processes while a bucket is on its way to them, once.

    Attributes:
      victims: their process ids.
      at: the bucket.
      before: kill them just before it is enqueued, else just after.
      stock: do not use our hook.
    """

    victims: tuple[int, ...] = ()
    at = 0
    before = False
    stock = False

    def announces(self, prepared: t.Prepared) -> bool:
        """As it is asked for."""
        return not self.stock and super().announces(prepared)

    async def send(self, bucket: Bucket, flat: torch.Tensor, *, timeout_s: float) -> None:
        """Sends it."""
        victims, self.victims = (self.victims, ()) if bucket.index == self.at else ((), self.victims)
        if self.before:
            self._kill(victims)
        sending = asyncio.create_task(super().send(bucket, flat, timeout_s=timeout_s))
        await asyncio.sleep(0)
        if not self.before:
            self._kill(victims)
        await sending

    def _kill(self, victims: tuple[int, ...]) -> None:
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclasses.dataclass
class Fleet:
    """What runs, and the trainer's weights."""

    engines: dict[str, Launched]
    buffer: str
    grpc: str
    http: str
    metrics: str
    resident: Resident
    label: int = -1
    published: Published = dataclasses.field(default_factory=Published)
    flat_s: dict[int, list[float]] = dataclasses.field(default_factory=dict[int, list[float]])

    @asynccontextmanager
    async def publisher(self, *names: str, stock: bool = False) -> AsyncIterator[tuple[Publisher, Killing]]:
        """A publisher to some engines, by our hook in them or as SGLang comes; the next trainer."""
        async with BufferClient(self.buffer) as buffer:
            await buffer.create_run(RUN_ID)
            term = (await buffer.resume_consumer(RUN_ID)).term
        transport = Killing(master_address="127.0.0.1")
        transport.stock = stock
        async with Some(self.grpc) as router:
            router.names = names
            publisher = Publisher(
                router,
                transport=transport,
                buckets=self.resident.buckets,
                gather=self.resident.gather,
                settings=PublishSettings(transport="nccl", timeout_s=TIMEOUT_S, retry_delay_s=0.5),
                run_id=RUN_ID,
            )
            self.label += 1
            self.resident.another(self.label)
            publisher.start(term=term, label=self.label, published=self.published)
            watching = asyncio.create_task(publisher.watch())
            try:
                yield publisher, transport
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
                await transport.shut_down()

    async def step(self, publisher: Publisher) -> float:
        """Other weights under the next label; returns how long it took from then on."""
        self.label += 1
        await publisher.prepare_ahead(self.label)
        self.resident.another(self.label)
        publisher.moved_to(self.label, due=True)
        return await self.publish(publisher)

    async def step_again(self, publisher: Publisher) -> float:
        """The weights as they are under the next label."""
        self.label += 1
        publisher.moved_to(self.label, due=True)
        return await self.publish(publisher)

    async def publish(self, publisher: Publisher) -> float:
        """Publishes what is due; returns how long that took."""

        async def done() -> float:
            begun = time.perf_counter()
            took = time.perf_counter() - begun if await publisher.catch_up() else 0.0
            return took if publisher.published.label == self.label else 0.0

        took = await until(f"label {self.label} is published", done, within_s=60)
        self.published = publisher.published
        return took

    def phases(self) -> dict[str, float]:
        """Seconds that the router has spent in each phase of transactions so far."""
        text = urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10).read().decode()
        found = re.findall(r'milepost_transaction_seconds_sum\{[^}]*phase="(\w+)"[^}]*\} (\S+)', text)
        return {phase: float(value) for phase, value in found}


@pytest.fixture(scope="module")
def fleet(launch_sglang: Any, service: Any, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """An engine on every GPU but the first, at most three."""
    config = tmp_path_factory.mktemp("shape")
    Qwen3Config(
        vocab_size=151936, head_dim=128, max_position_embeddings=40960, eos_token_id=1, pad_token_id=0,
        dtype="bfloat16", architectures=["Qwen3ForCausalLM"],
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, **SHAPES[SHAPE],
    ).save_pretrained(config)  # fmt: skip
    data = tmp_path_factory.mktemp("redis")
    buffer = service("milepost_buffer", "--listen", "127.0.0.1:0", "--data_dir", str(data))
    buffer_at = buffer.address(buffer.ready(), "grpc")
    listen = ("--listen", "127.0.0.1:0", "--http_listen", "127.0.0.1:0", "--metrics_listen", "127.0.0.1:0")
    router = service("milepost_router", *listen, "--buffer", buffer_at, "--engine_call_timeout_s", "10")
    line = router.ready()
    grpc, http = router.address(line, "grpc"), "http://" + router.address(line, "http")
    engines = {
        f"e{gpu}": launch_sglang(
            f"e{gpu}", "--router", grpc, "--engine-id", f"e{gpu}", "--run-id", RUN_ID,
            model=config, base_gpu_id=gpu, load_format="dummy", skip_tokenizer_init=True,
            sampling_backend="pytorch", disable_cuda_graph=True, mem_fraction_static=0.3,
        )
        for gpu in range(1, min(int(os.environ.get("MILEPOST_ENGINES", "3")) + 1, torch.cuda.device_count()))
    }  # fmt: skip
    resident = Resident(config, bucket_bytes=int(os.environ.get("MILEPOST_BUCKET_MIB", "1024")) << 20)
    for each in engines.values():
        assert each.ready(), each.log.read_text()[-5000:]
    return Fleet(engines, buffer_at, grpc, http, router.address(line, "metrics"), resident)


async def states(fleet: Fleet) -> dict[str, t.Engine]:
    """Engines by name."""
    async with RouterClient(fleet.grpc) as router:
        return {e.engine_id: e for e in (await router.list_engines()).engines}


async def everywhere(fleet: Fleet, publisher: Publisher, *names: str, within_s: float = 60) -> Any:
    """Publishes until engines serve what is published, under the label that is due."""

    async def check() -> Any:
        await publisher.catch_up()
        found = await states(fleet)
        version = publisher.published.version
        good = [found[n].state is EngineState.SERVING and found[n].weight_version == version for n in names]
        return found if all(good) and publisher.published.label == fleet.label else None

    found = await until(f"{names} serve", check, within_s=within_s)
    fleet.published = publisher.published
    return found


async def reply_of(url: str, *, version: int = 0) -> Any:
    """What an engine, or any by the router, generates."""
    sampling = {"max_new_tokens": 16, "temperature": 1.0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}
    headers = {"x-milepost-run": RUN_ID, "x-milepost-version": str(version)} if version else {}
    async with httpx.AsyncClient(timeout=60) as http:
        reply = await http.post(url + "/generate", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def right(fleet: Fleet, *names: str) -> float:
    """Makes sure that engines generate by the trainer's weights; returns the largest difference."""
    found = await states(fleet)
    worst = 0.0
    for name in names:
        differences = fleet.resident.differences(await reply_of(found[name].url))
        worst = max(worst, *differences)
        assert statistics.mean(differences) < 0.5, (name, differences)  # of other weights: several
    return worst


async def checksum(url: str) -> str:
    """Of an engine's weights, as SGLang counts."""
    async with httpx.AsyncClient(timeout=30) as http:
        reply = (await http.post(url + "/weights_checker", json={"action": "checksum"})).json()
    return reply["ranks"][0]["per_gpu_checksum"]


def flat(fleet: Fleet, receivers: int) -> list[float]:
    """Seconds of one flat broadcast of as many bytes; measured once."""
    if receivers not in fleet.flat_s:
        fleet.flat_s[receivers] = measure_flat(fleet, receivers)
    return fleet.flat_s[receivers]


def measure_flat(fleet: Fleet, receivers: int) -> list[float]:
    """Several of them."""
    command = [sys.executable, flat_broadcast.__file__]
    words = map(str, (fleet.resident.bytes, receivers, ROUNDS))
    done = subprocess.run(
        [*command, *words, free_port()], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


async def rounds(fleet: Fleet, *names: str, stock: bool = False) -> dict[str, Any]:
    """Several publications to some engines, and what they took."""
    seconds: list[float] = []
    async with fleet.publisher(*names, stock=stock) as (publisher, _):
        begun = time.perf_counter()
        await everywhere(fleet, publisher, *names)
        first = time.perf_counter() - begun
        before = fleet.phases()
        for _ in range(ROUNDS):
            seconds.append(await fleet.step(publisher))
        after = fleet.phases()
        worst = await right(fleet, *names)
    phases = {phase: (after[phase] - before[phase]) / ROUNDS for phase in after}
    row: dict[str, Any] = {"engines": len(names), "stock": stock, "first_s": first, "publish_s": seconds}
    row["phases_s"] = phases
    row |= {"flat_broadcast_s": flat(fleet, len(names)), "largest_difference": worst}
    return row | {
        "median_s": statistics.median(seconds),
        "median_without_verify_s": statistics.median(seconds) - phases["verify"],
        "flat_median_s": statistics.median(row["flat_broadcast_s"]),
    }


def report(out: Path, fleet: Fleet, name: str, row: dict[str, Any]) -> None:
    """Keeps a row, and prints it."""
    row = {"shape": SHAPE, "bytes": fleet.resident.bytes, "buckets": len(fleet.resident.buckets)} | row
    (out / f"nccl-{SHAPE}-{name}.json").write_text(json.dumps(row))
    print(name, json.dumps({key: row[key] for key in row if not key.endswith("_s") or "median" in key}))


@pytest.mark.gpu(2)
@pytest.mark.parametrize("stock", [True, False], ids=["stock", "hook"])
async def test_one_to_one(fleet: Fleet, out: Path, stock: bool):
    report(out, fleet, "1-stock" if stock else "1", await rounds(fleet, "e1", stock=stock))


@pytest.mark.gpu(4)
@pytest.mark.parametrize("stock", [True, False], ids=["stock", "hook"])
async def test_one_to_three(fleet: Fleet, out: Path, stock: bool):
    report(out, fleet, "3-stock" if stock else "3", await rounds(fleet, "e1", "e2", "e3", stock=stock))


@pytest.mark.gpu(2)
async def test_the_hook_leaves_the_bytes_that_sglang_itself_leaves(fleet: Fleet):
    sums: list[str] = []
    for stock in (False, True):
        async with fleet.publisher("e1", stock=stock) as (publisher, _):
            await everywhere(fleet, publisher, "e1")
            await fleet.step(publisher)
            fleet.resident.another(7)
            await fleet.step_again(publisher)
            sums.append(await checksum((await states(fleet))["e1"].url))
    assert sums[0] == sums[1]
    async with fleet.publisher("e1") as (publisher, _):
        await everywhere(fleet, publisher, "e1")
        assert await checksum((await states(fleet))["e1"].url) != sums[0]


@pytest.mark.gpu(4)
@pytest.mark.parametrize("before", [False, True], ids=["during", "before"])
async def test_one_of_three_is_killed_in_mid_broadcast(fleet: Fleet, out: Path, before: bool):
    """The trainer is back within its deadline, all are started again and serve; a request in flight ends."""
    if before and "MILEPOST_KILL_TWICE" not in os.environ:
        pytest.skip("as the other, at another moment; set MILEPOST_KILL_TWICE")
    async with fleet.publisher() as (publisher, transport):
        was = await everywhere(fleet, publisher, *fleet.engines)
        await fleet.step(publisher)
        fleet.label += 1
        fleet.resident.another(fleet.label)
        publisher.moved_to(fleet.label, due=True)
        transport.victims = tuple(group_of(fleet.engines["e2"].server()))
        transport.at, transport.before = len(fleet.resident.buckets) // 2, before
        running = [asyncio.create_task(reply_of(was[name].url)) for name in ("e1", "e3")]
        begun = time.perf_counter()
        assert not await publisher.catch_up()
        back_s = time.perf_counter() - begun
        assert back_s < TIMEOUT_S
        assert transport.victims == ()
        await asyncio.gather(*running, return_exceptions=True)
        found = await everywhere(fleet, publisher, *was, within_s=240)
        all_s = time.perf_counter() - begun
    assert all(found[name].instance_id != was[name].instance_id for name in was)
    worst = await right(fleet, *found)
    row = {"trainer_back": round(back_s, 3), "all_serve": round(all_s, 1), "largest_difference": worst}
    report(out, fleet, "killed", row | {"deadline": TIMEOUT_S})
