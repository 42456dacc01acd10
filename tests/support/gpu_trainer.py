"""A trainer's publishing half on a GPU, and the fleet it publishes to; for tests with real engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from launched import Launched
from milepost import BufferClient, RouterClient
from milepost.types import Engine
from milepost_trainer.buckets import plan_buckets, read_bucket
from milepost_trainer.publisher import Published, Publisher
from milepost_trainer.settings import PublishSettings
from milepost_trainer.transports.build import build_transport
from stack import until

PROMPT = [3, 4, 12, 5, 13]
TOLERANCE = 1e-1


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


class Trainer:
    """The publishing half of a trainer: weights on the GPU, and the publisher."""

    def __init__(self, model: Path, term: int, fleet: Fleet) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().cuda()
        self.run_id, self.term, self.fleet = fleet.run_id, term, fleet
        self.held = self._bfloat16()
        self.seconds: list[float] = []
        self.way: Any = None

    @classmethod
    async def next(cls, model: Path, fleet: Fleet) -> Trainer:
        """The next trainer of the one run that the engines work for."""
        async with BufferClient(fleet.buffer) as buffer:
            await buffer.create_run(fleet.run_id)
            term = (await buffer.resume_consumer(fleet.run_id)).term
        return cls(model, term, fleet)

    def perturb(self, seed: int, *, scale: float = 0.05) -> None:
        """New weights, which bfloat16 can hold."""
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                noise = scale * torch.randn(parameter.shape, generator=generator, device="cuda")
                parameter.copy_((parameter + noise).to(torch.bfloat16).float())
        self.held = self._bfloat16()

    def _bfloat16(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().to(torch.bfloat16) for n, p in self.model.named_parameters()}

    @asynccontextmanager
    async def publisher(self, transport: str, **changes: Any) -> AsyncIterator[Publisher]:
        """A publisher by one transport, which watches the fleet; `changes` are settings of it."""
        given: dict[str, Any] = {"transport": transport, "bucket_bytes": 100_000, "timeout_s": 60.0}
        settings = PublishSettings(**(given | changes))
        way = self.way = build_transport(settings, run_id=self.run_id)
        sizes = [(name, "bfloat16", tuple(x.shape)) for name, x in self.held.items()]
        buckets = plan_buckets(sizes, bucket_bytes=1 << 62 if way.single_bucket else settings.bucket_bytes)

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
            tokens = torch.tensor([PROMPT + output], device="cuda")
            logits = self.model(tokens, use_cache=False).logits[0, len(PROMPT) - 1 : -1].double()
        return logits.log_softmax(-1).gather(1, tokens[0, len(PROMPT) :, None])[:, 0].tolist()


async def all_engines(fleet: Fleet) -> dict[str, Engine]:
    """What the router knows, by name."""
    async with RouterClient(fleet.grpc) as router:
        return {e.engine_id: e for e in (await router.list_engines()).engines}


async def publish(publisher: Publisher, trainer: Trainer) -> Published:
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


async def generate(trainer: Trainer, *, tokens: int = 24, version: int | None = None) -> tuple[Any, Any]:
    """One reply through the router, and its headers; `version`: of these weights alone."""
    headers = {"x-milepost-run": trainer.run_id}
    if version is not None:
        headers["x-milepost-version"] = str(version)
    sampling = {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}
    async with httpx.AsyncClient(timeout=60) as http:
        reply = await http.post(trainer.fleet.http + "/generate", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json(), reply.headers


def matches(trainer: Trainer, reply: Any, *, last: int = 0) -> None:
    """Compares a reply's log-probs with the trainer's; `last`: only of its last tokens."""
    got = [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]
    expected = trainer.logprobs(reply["output_ids"])
    assert got[-last:] == pytest.approx(expected[-last:], abs=TOLERANCE)
