"""Engines go on beside the publication of what they hold; buffer, trainer or router die in between.

In between is made by suspending the buffer before the commit: its answer comes when it is woken, or never.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from milepost import RouterClient, errors
from milepost import types as t
from milepost.convert import make_group
from milepost.types import EngineState, SealStatus, Transport, VersionState


@dataclass
class Stage:
    """One engine that serves version 1, a buffer that can be suspended, and weights on their way."""

    helpers: Any
    engine: Any
    buffer: Any
    router: Any
    publisher: Any
    first: t.Committed

    @property
    def run_id(self) -> str:
        return self.publisher.run_id

    def suspend_buffer(self) -> None:
        self.buffer.process.send_signal(signal.SIGSTOP)

    def wake_buffer(self) -> None:
        self.buffer.process.send_signal(signal.SIGCONT)

    async def transfer(self) -> tuple[t.Prepared, int]:
        """The next version's weights, all of them, not committed."""
        state = self.helpers.weights(2)
        prepared = await self.publisher.prepare(state, label=1, transport=Transport.SHM)
        return prepared, len(await self.publisher.transfer(prepared, state, Transport.SHM))

    async def serves(self, version: int) -> None:
        await self.helpers.all_are(self.publisher.router, EngineState.SERVING, version=version)

    async def generate(self, **more: Any) -> Any:
        return await self.helpers.generate(self.router.http, headers={"x-milepost-run": self.run_id}, **more)

    async def running(self) -> None:
        """Waits until the engine generates."""

        async def check() -> bool:
            return (await self._look("/server_info"))["internal_states"][0]["num_running_reqs"] == 1

        await self.helpers.until("the engine generates", check)

    async def named(self, version: int) -> None:
        """Waits until the engine itself carries the version's name, asked past the router."""

        async def check() -> bool:
            return (await self._look("/model_info"))["weight_version"] == f"{self.run_id}/{version}/1"

        await self.helpers.until("the engine has its name", check)

    async def _look(self, path: str) -> Any:
        url = self.engine.url + path
        async with self.helpers.http_session() as session, session.get(url) as reply:
            return await reply.json()

    async def state_of(self, version: int) -> VersionState:
        """What the ledger says of a version."""
        return (await self.publisher.weights.get_version(self.run_id, version=version)).state


@pytest.fixture
def stage(
    helpers: Any,
    engines: Any,
    start_buffer: Any,
    start_router: Any,
    start_router_process: Any,
    publisher_of: Any,
) -> Callable[..., Any]:
    """Makes a stage; `process`: the router is one of its own, and can be killed."""

    async def make(*, process: bool = False) -> Stage:
        buffer, engine = start_buffer(), engines[0]
        address = buffer.address("grpc")
        if process:
            router = start_router_process(engine.url, buffer=address)
        else:
            router = await start_router(engine.url, buffer=address)
        publisher = await publisher_of(router, at=address)
        await helpers.all_are(publisher.router, EngineState.STALE)
        first = await publisher.publish(helpers.weights(1), label=0)
        return Stage(helpers, engine, buffer, router, publisher, first)

    return make


async def test_an_engine_serves_while_the_ledger_is_silent_and_the_trainer_hears_when_it_has_spoken(stage):
    it = await stage()
    prepared, buckets = await it.transfer()
    it.suspend_buffer()
    committing = asyncio.create_task(it.publisher.commit(prepared, buckets))
    await it.serves(prepared.version)
    answer = await it.generate()
    assert answer.status == 200
    assert answer.headers["x-milepost-version-start"] == str(prepared.version)
    assert not committing.done()
    it.wake_buffer()
    committed = await committing
    assert committed.serving == (it.engine.engine_id,)
    known = await it.publisher.weights.get_version(it.run_id, version=prepared.version)
    assert (known.state, known.members) == (VersionState.PUBLISHED, committed.serving)


def group_under(versions: list[int], lease: t.PromptLease) -> t.Group:
    """A group whose tokens were generated under these versions, one each."""
    n = 1 + len(versions)
    mask = np.array([0, *[1] * len(versions)], np.uint8)
    spans = tuple(
        t.VersionSpan(start=i, end=i + 1, weight_version=version) for i, version in enumerate(versions, 1)
    )
    samples = [
        t.Sample(
            index=index,
            tokens=np.arange(n, dtype=np.int32),
            loss_mask=mask,
            logprobs=np.zeros(n, np.float32),
            prompt_length=1,
            version_spans=spans,
            outcome=t.Outcome.COMPLETED,
            reward=1.0,
        )
        for index in range(lease.num_samples)
    ]
    return make_group(lease.prompt, attempt=lease.attempt, samples=samples)


async def test_a_version_that_is_refused_when_it_is_served_already_is_withdrawn_and_never_trained_on(stage):
    it = await stage()
    buffer = it.publisher.buffer
    prompt = t.Prompt(prompt_id="p", input_ids=np.array([1], np.int32))
    await buffer.put_prompts(it.run_id, items=[t.PromptItem(prompt=prompt)])
    [lease] = (await buffer.lease_prompts(it.run_id, gateway_id="g", instance_id="i", max_prompts=1)).leases
    in_flight = asyncio.create_task(it.generate(tokens=60_000))
    await it.running()
    prepared, buckets = await it.transfer()
    void = prepared.version
    successor = (await buffer.resume_consumer(it.run_id)).term  # the router has not heard of it
    it.suspend_buffer()
    committing = asyncio.create_task(it.publisher.commit(prepared, buckets))
    await it.serves(void)
    assert (await it.generate()).headers["x-milepost-version-start"] == str(void)
    it.wake_buffer()
    with pytest.raises(errors.StaleTerm):
        await committing
    await it.helpers.all_are(it.publisher.router, EngineState.STALE)
    assert (await in_flight).status == 503, "what was generated under both of them goes nowhere"
    assert (await it.generate()).status == 503
    assert await it.state_of(void) is VersionState.VOID
    for versions in ([void], [it.first.version, void]):
        [sealed] = await buffer.put_groups(it.run_id, groups=[group_under(versions, lease)])
        assert sealed.status is SealStatus.INVALID
        assert f"weight version {void} was burned by a newer trainer" in sealed.message
    it.publisher.term = successor
    again = await it.publisher.publish(it.helpers.weights(2), label=1)
    assert again.version > void
    await it.serves(again.version)
    [sealed] = await buffer.put_groups(it.run_id, groups=[group_under([it.first.version], lease)])
    assert sealed.status is SealStatus.SEALED, "the same prompt, rolled again"


async def test_a_buffer_that_is_killed_in_between_is_told_when_it_is_back(stage, start_buffer):
    it = await stage()
    prepared, buckets = await it.transfer()
    it.suspend_buffer()
    committing = asyncio.create_task(it.publisher.commit(prepared, buckets))
    await it.serves(prepared.version)
    address = it.buffer.address("grpc")
    it.buffer.kill()
    committed = await committing
    assert (committed.serving, committed.published) == ((it.engine.engine_id,), False)
    assert (await it.generate()).status == 200
    assert start_buffer(address).line

    async def published() -> bool:
        return await it.state_of(prepared.version) is VersionState.PUBLISHED

    await it.helpers.until("the ledger has it", published)
    await it.serves(prepared.version)


async def _killed_in_between(it: Stage, start_router_process: Any, *, replaced: bool) -> int:
    """Kills the router while its engine goes on and the ledger has not answered; returns the version.

    `replaced`: another trainer has opened its term before, and the router does not know.
    """
    prepared, buckets = await it.transfer()
    if replaced:
        await it.publisher.buffer.resume_consumer(it.run_id)
    it.suspend_buffer()
    committing = asyncio.create_task(it.publisher.commit(prepared, buckets))
    await it.named(prepared.version)
    it.router.kill()
    committing.cancel()
    await asyncio.gather(committing, return_exceptions=True)
    it.wake_buffer()
    it.router = start_router_process(it.engine.url, buffer=it.buffer.address("grpc"))
    return prepared.version


async def test_a_router_that_is_killed_in_between_leaves_the_rest_to_its_successor(
    stage, start_router_process
):
    it = await stage(process=True)
    version = await _killed_in_between(it, start_router_process, replaced=False)
    async with RouterClient(it.router.grpc) as router:
        await it.helpers.all_are(router, EngineState.SERVING, version=version)
    assert await it.state_of(version) is VersionState.PUBLISHED
    assert (await it.generate()).status == 200


async def test_neither_router_nor_successor_serve_what_a_newer_trainer_has_voided(
    stage, start_router_process, publisher_of
):
    it = await stage(process=True)
    version = await _killed_in_between(it, start_router_process, replaced=True)
    heir = await publisher_of(it.router, at=it.buffer.address("grpc"))
    await it.helpers.all_are(heir.router, EngineState.STALE)
    assert (await it.generate()).status == 503
    assert await it.state_of(version) is VersionState.VOID
    again = await heir.publish(it.helpers.weights(2), label=1)
    assert again.version > version
