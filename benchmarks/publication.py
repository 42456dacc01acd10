"""A trainer's publishing half beside an engine on the same GPU, for `benchmarks.gpu`.

    weights of a shape, in bfloat16 ── Gathering, Publisher ──> router ──> engine
                                                                  └──> buffer (Redis, appendfsync always)

Everything but the weights is what runs in a real run: the services as processes, the publisher, the engine as
its launcher starts it. The engine's own weights are dummies until the first publication. On a machine without
a GPU the CPU engine and shared memory stand in, which shows that the benchmark runs, and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.children import child, python
from milepost import BufferClient, RouterClient
from milepost import types as t
from milepost_trainer.backends.gathering import Gathering
from milepost_trainer.buckets import Bucket, plan_buckets
from milepost_trainer.publisher import Published, Publisher
from milepost_trainer.settings import PublishSettings
from milepost_trainer.transports.build import build_transport
from milepost_trainer.world import World

T = TypeVar("T")
RUN_ID = "bench"
START_S = 400.0
WAIT_S = 60.0
SGLANG: dict[str, Any] = {
    "dtype": "bfloat16",
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_total_tokens": 65536,
    "max_running_requests": 64,
    "context_length": 4096,
    "cuda_graph_max_bs_decode": 16,
    "grammar_backend": "none",
    "sampling_backend": "pytorch",
}
_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
SHAPES: Mapping[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "0.6b": _QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "8b": _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass
class Fleet:
    """What runs, and where; its logs lie in `folder`."""

    folder: Path
    buffer: str
    grpc: str
    http: str
    engine: str
    term: int


@dataclass
class Rounds:
    """Publications one way, in seconds.

    Attributes:
      whole: from weights at rest to the trainer's answer: the engine serves them, and the ledger holds them.
      served: from weights at rest until the trainer sees the engine serve them.
      transfer: of the whole, until the engine has written them.
      commit: of the whole, from there on.
      ahead: preparation, while the step still made the weights.
      hook: inside the engine's process, as its report says.
    """

    whole: list[float] = field(default_factory=list[float])
    served: list[float] = field(default_factory=list[float])
    transfer: list[float] = field(default_factory=list[float])
    commit: list[float] = field(default_factory=list[float])
    ahead: list[float] = field(default_factory=list[float])
    hook: list[float] = field(default_factory=list[float])


class Clocked(RouterClient):
    """A router's client that notes how long its calls took.

    Attributes:
      served_at: when it first saw all engines serve a label.
    """

    def __init__(self, address: str, rounds: Rounds) -> None:
        super().__init__(address)
        self._rounds = rounds
        self.served_at: dict[int, float] = {}

    async def watch_fleet(self, run_id: str = "", *, max_interval_s: float = 10.0) -> AsyncIterator[t.Fleet]:
        """As the client's."""
        async for fleet in super().watch_fleet(run_id, max_interval_s=max_interval_s):
            labels = {(e.state, e.weight_label) for e in fleet.engines}
            if len(labels) == 1 and labels.copy().pop()[0] is t.EngineState.SERVING:
                self.served_at.setdefault(labels.pop()[1], time.perf_counter())
            yield fleet

    async def prepare_weights(self, request: t.PrepareRequest) -> t.Prepared:
        """As the client's."""
        return await _timed(self._rounds.ahead, super().prepare_weights(request))

    async def commit_weights(self, *args: Any, **options: Any) -> t.Committed:
        """As the client's."""
        return await _timed(self._rounds.commit, super().commit_weights(*args, **options))


async def _timed(into: list[float], work: Awaitable[T]) -> T:
    begun = time.perf_counter()
    try:
        return await work
    finally:
        into.append(time.perf_counter() - begun)


class Trainer:
    """Weights of a shape, and publishers of them.

    Args:
      shape: a key of SHAPES.
      device: where they lie.
      fleet: who gets them.
    """

    def __init__(self, shape: str, device: torch.device, fleet: Fleet) -> None:
        self.device, self.fleet = device, fleet
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.weights = {
            name: torch.randn(size, device=device, dtype=dtype).mul_(0.02)
            for name, size in sizes_of(shape).items()
        }
        self.size_bytes = sum(x.nbytes for x in self.weights.values())
        self.label = -1
        self.published = Published()
        self._served_at: dict[int, float] = {}
        self._gathering = Gathering(self.weights, World(device=device), resident=True)

    @property
    def on_gpu(self) -> bool:
        """They lie on a GPU."""
        return self.device.type == "cuda"

    def train(self) -> None:
        """Other weights, in the same places; done when it returns."""
        torch._foreach_mul_(list(self.weights.values()), 0.999)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        self.synchronize()

    def synchronize(self) -> None:
        """Waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @asynccontextmanager
    async def publisher(self, *, shared: bool, **changes: Any) -> AsyncGenerator[tuple[Publisher, Rounds]]:
        """A publisher; `shared`: engines copy the weights from where they lie."""
        transport = "cuda_ipc" if self.on_gpu else "shm"
        given: dict[str, Any] = {"transport": transport, "bucket_bytes": 1 << 62, "timeout_s": WAIT_S}
        settings, rounds = PublishSettings(**(given | changes)), Rounds()
        way = build_transport(settings, run_id=RUN_ID)
        layout = [
            (name, str(x.dtype).removeprefix("torch."), tuple(x.shape)) for name, x in self.weights.items()
        ]
        buckets = plan_buckets(layout, bucket_bytes=settings.bucket_bytes)

        async def gather(bucket: Bucket) -> torch.Tensor:
            flat = await asyncio.to_thread(self._gathering.bucket, bucket)
            assert flat is not None
            return flat

        async def whole() -> Mapping[str, torch.Tensor]:
            return await asyncio.to_thread(self._gathering.whole, buckets)

        async with Clocked(self.fleet.grpc, rounds) as router:
            self._served_at = router.served_at
            publisher = Publisher(
                router,
                transport=way,
                buckets=buckets,
                gather=gather,
                whole=whole if shared else None,
                settings=settings,
                run_id=RUN_ID,
            )
            publisher.start(term=self.fleet.term, label=max(0, self.label), published=self.published)
            watching = asyncio.create_task(publisher.watch())
            try:
                yield publisher, rounds
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
                await way.shut_down()

    async def publish(self, publisher: Publisher, rounds: Rounds, *, still: bool = False) -> float:
        """One step's end: prepared ahead, then weights at rest, then published; `still`: the weights stay.

        Returns when the weights were there, on the monotonic clock.
        """
        first = self.label < 0
        if not first:
            await _until("engines serve", lambda: not publisher.lacking)
        self.label += 1
        publisher.start(term=self.fleet.term, label=max(0, self.label - 1), published=self.published)
        work = asyncio.to_thread(self.synchronize if still else self.train)
        await publisher.while_made(self.label, work)
        if first:
            await _until("an engine is there", lambda: publisher.lacking)
        before = len(rounds.commit)
        begun = time.perf_counter()
        publisher.moved_to(self.label, due=True)
        while not await publisher.catch_up():
            await asyncio.sleep(0.2)
            begun = time.perf_counter()
        rounds.whole.append(time.perf_counter() - begun)
        rounds.transfer.append(rounds.whole[-1] - sum(rounds.commit[before:]))
        self.published = publisher.published
        await _until("the trainer sees them served", lambda: self.label in self._served_at)
        rounds.served.append(self._served_at[self.label] - begun)
        return begun

    async def read(self, name: str) -> Any:
        """What the hook in the engine answers to a name."""
        body = {"name": name, "truncate_size": 1}
        reply = await self._post("/get_weights_by_name", body)
        return json.loads(bytes(int(x) for x in reply))

    async def checksum(self) -> tuple[str, float]:
        """The engine's checksum of its weights, and how long that took."""
        begun = time.perf_counter()
        reply = await self._post("/weights_checker", {"action": "checksum"})
        return str(reply["ranks"][0]["per_gpu_checksum"]), time.perf_counter() - begun

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        async with httpx.AsyncClient(timeout=WAIT_S) as http:
            reply = await http.post(self.fleet.engine + path, json=body)
        reply.raise_for_status()
        return reply.json()


def sizes_of(shape: str) -> dict[str, tuple[int, ...]]:
    """Names and sizes of a shape's weights."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPES[shape]))
    return {name: tuple(x.shape) for name, x in model.named_parameters()}


def save_config(shape: str, folder: Path) -> Path:
    """A folder with the shape's config.json alone."""
    config = Qwen3Config(**SHAPES[shape], eos_token_id=1, pad_token_id=0)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    return folder


@asynccontextmanager
async def running(
    shape: str, *, device: torch.device, folder: Path, options: Mapping[str, Any]
) -> AsyncGenerator[Fleet]:
    """A buffer, a router and an engine of that shape."""
    model = await asyncio.to_thread(save_config, shape, folder / "model")
    anywhere = ("--listen", "127.0.0.1:0")
    data = ("--data_dir", folder / "redis")
    async with child(
        "buffer", *python("milepost_buffer", "serve", *anywhere, *data), folder=folder
    ) as buffer:
        await buffer.ready()
        address = buffer.address("grpc")
        flags = (*anywhere, "--http_listen", "127.0.0.1:0", "--buffer", address, "--no-verify_checksum")
        async with child("router", *python("milepost_router", "serve", *flags), folder=folder) as router:
            await router.ready()
            grpc, http = router.address("grpc"), "http://" + router.address("http")
            command = _engine(model, grpc, device=device, folder=folder, options=options)
            async with child("engine", *command, folder=folder) as engine:
                url = await engine.ready(r"engine ready (\S+)", within_s=START_S)
                async with BufferClient(address) as client:
                    await client.create_run(RUN_ID)
                    term = (await client.resume_consumer(RUN_ID)).term
                yield Fleet(folder, address, grpc, http, url, term)


def _engine(
    model: Path, router: str, *, device: torch.device, folder: Path, options: Mapping[str, Any]
) -> tuple[str, ...]:
    flags = ("--model", model, "--port", 0, "--router", router, "--engine-id", "engine")
    if device.type != "cuda":
        return python("milepost_engine", "serve", *flags, "--skip-tokenizer-init")
    rows = [f"{key} = {json.dumps(value)}" for key, value in (SGLANG | dict(options)).items()]
    config = folder / "engine.toml"
    config.write_text("\n".join(["[engine.sglang]", *rows, ""]))
    return python("milepost_engine", "serve", "--config", config, "--backend", "sglang", *flags)


async def _until(what: str, check: Any) -> None:
    try:
        async with asyncio.timeout(WAIT_S):
            while True:
                if check():
                    return
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise TimeoutError(f"not within {WAIT_S:g} s: {what}") from None
