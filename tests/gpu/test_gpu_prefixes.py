"""An engine that caches prefixes: KV of older weights stays in it, and no new request finds it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpu_trainer import PROMPT, Fleet, Trainer, all_engines, generate, matches, publish
from stack import until

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def fleet(start_fleet: Any) -> Fleet:
    """One engine, with its prefix cache."""
    return start_fleet(bare=False, disable_radix_cache=False)


@pytest.fixture
async def trainer(fleet: Fleet, gpu_model: Path) -> Trainer:
    """The next trainer of the one run that the engine works for."""
    return await Trainer.next(gpu_model, fleet)


async def test_kv_of_older_weights_is_in_the_cache_and_found_by_nobody(fleet, trainer):
    trainer.perturb(1)
    async with trainer.publisher("cuda_ipc", pause_mode="in_place") as publisher:
        old = await publish(publisher, trainer)
        await generate(trainer)
        assert await cached(trainer) > 0, "the prompt is in the cache"
        running = asyncio.create_task(generate(trainer, tokens=1500))

        async def in_flight() -> bool:
            return (await all_engines(fleet))["launched"].in_flight > 0

        await until("it runs, and keeps SGLang from flushing", in_flight, within_s=20)
        trainer.perturb(2)
        new = await publish(publisher, trainer)
        assert new.version > old.version
        assert await cached(trainer) == 0, "found under other weights"
        assert await cached(trainer) > 0
        await running
    assert await cached_under(fleet, f"{fleet.run_id}/{old.version}/{old.label}") > 0, "it is there still"


async def cached(trainer: Trainer) -> int:
    """Tokens of the prompt that came from the cache; what is generated must be the trainer's."""
    reply, _ = await generate(trainer)
    matches(trainer, reply)
    return reply["meta_info"]["cached_tokens"]


async def cached_under(fleet: Fleet, key: str) -> int:
    """What a request with that key finds, asked past the router."""
    url = (await all_engines(fleet))["launched"].url
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}, "extra_key": key}
    async with httpx.AsyncClient(timeout=60) as http:
        reply = await http.post(url + "/generate", json=body)
    return reply.json()["meta_info"]["cached_tokens"]
