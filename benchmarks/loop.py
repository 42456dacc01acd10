"""Period of the asynchronous loop with simulated trainer and engine times, beside the slower of the two.

    feeder ──> buffer <── gateway ──> router ──> two engines that answer after T_generate
                 ▲                      ▲
                 └─── trainer: lease, fetch, T_train, commit, publish (a weight transaction by disk)

Buffer, router and gateway are the real processes. The gateway has room for one step's samples, so a step is
rolled out in T_generate. Trained steps are counted once the pipeline is full. Wall-clock by nature: T is long
beside what the services do, and the reference is max(T_train, T_generate), a constant.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.children import Child, child, python
from benchmarks.measure import Row, Size, ratio_row
from benchmarks.simulation import RUN_ID, SimulatedEngine, save_tokenizer
from milepost import BufferClient, RouterClient
from milepost import types as t
from milepost.convert import open_group

TARGET = 1.05
SLOW_S, FAST_S = 1.5, 1.0
GROUPS, SAMPLES = 4, 2
WARM_UP = 2
CALL_S = 30.0
ANYWHERE = "127.0.0.1:0"
_WEIGHT = t.TensorSpec(name="model.weight", dtype="float32", shape=(1,))


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The services of one loop."""

    buffer: BufferClient
    router: RouterClient
    folder: Path


async def measure(size: Size, folder: Path) -> list[Row]:
    """Once with the trainer the slower one, once with the engines."""
    rows: list[Row] = []
    slow_s, fast_s = max(0.3, SLOW_S * size.scale), max(0.2, FAST_S * size.scale)
    for name, train_s, generate_s in (("loop_train", slow_s, fast_s), ("loop_generate", fast_s, slow_s)):
        place = folder / name
        place.mkdir()
        async with _services(place, generate_s) as loop:
            periods = await _Trainer(loop, train_s).run(size.runs)
        rows.append(
            ratio_row(
                name,
                {"ours": periods, "reference": [slow_s] * len(periods)},
                unit="s a step",
                target=TARGET,
                compared="max(T_train, T_generate)",
                more={"train_s": train_s, "generate_s": generate_s, "mean_s": sum(periods) / len(periods)},
            )
        )
    return rows


@asynccontextmanager
async def _services(folder: Path, generate_s: float) -> AsyncGenerator[Loop]:
    tokenizer = save_tokenizer(folder / "model")
    async with AsyncExitStack() as stack:

        async def service(name: str, *flags: object) -> Child:
            listen = ("--listen", ANYWHERE, "--metrics_listen", ANYWHERE)
            command = python(f"milepost_{name}", "serve", *listen, *flags)
            started = await stack.enter_async_context(child(name, *command, folder=folder))
            await started.ready()
            return started

        engines = [await stack.enter_async_context(SimulatedEngine(generate_s).serving()) for _ in range(2)]
        ledger = (await service("buffer", "--data_dir", folder / "redis")).address("grpc")
        fleet = ("--buffer", ledger, "--engines", ",".join(engines), "--probe_interval_s", 0.1)
        router = await service("router", *fleet, "--http_listen", ANYWHERE)
        buffer = await stack.enter_async_context(BufferClient(ledger))
        config = t.RunConfig(
            groups_per_step=GROUPS,
            samples_per_prompt=SAMPLES,
            max_staleness=2,
            reward="exact",
            sampling=t.SamplingParams(max_new_tokens=64),
        )
        await buffer.create_run(RUN_ID, config=config)
        run = ("--buffer", ledger, "--run_id", RUN_ID, "--tokenizer", tokenizer)
        to_router = ("--router", router.address("grpc"), "--router_http", f"http://{router.address('http')}")
        await service("rollout", *run, *to_router, "--max_concurrent_samples", GROUPS * SAMPLES)
        client = await stack.enter_async_context(RouterClient(router.address("grpc")))
        yield Loop(buffer=buffer, router=client, folder=folder)


class _Trainer:
    """Leases, sleeps, commits and publishes; feeds prompts besides.

    Args:
      loop: the services.
      train_s: how long a step's training takes.
    """

    def __init__(self, loop: Loop, train_s: float) -> None:
        self._loop, self._train_s = loop, train_s
        self._term = 0

    async def run(self, steps: int) -> list[float]:
        """Trains until `steps` periods are measured behind the warm-up; returns them."""
        buffer = self._loop.buffer
        self._term = (await buffer.resume_consumer(RUN_ID)).term
        await buffer.resume_consumer(RUN_ID, term=self._term, checkpoint_step=0)
        feeder = asyncio.create_task(self._feed((steps + WARM_UP + 4) * GROUPS), name="feeder")
        try:
            async with asyncio.timeout(CALL_S + 4 * (steps + WARM_UP) * SLOW_S):
                await self._engines_are_there()
                await self._publish(0)
                ends: list[float] = []
                for step in range(1, steps + WARM_UP + 1):
                    await self._train(step)
                    ends.append(time.monotonic())
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
        return [later - earlier for earlier, later in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]

    async def _feed(self, count: int) -> None:
        for number in range(count):
            item = t.PromptItem(prompt=t.Prompt(prompt_id=f"p{number}", text="w2 w3 ?", label="w4"))
            while not (await self._loop.buffer.put_prompts(RUN_ID, items=[item], max_wait_s=CALL_S)).accepted:
                pass  # each call waits for credits

    async def _engines_are_there(self) -> None:
        """Waits until the router has looked at both; its caller has a deadline."""
        async for fleet in self._loop.router.watch_fleet(max_interval_s=CALL_S):
            if len(fleet.engines) == 2 and all(e.state is t.EngineState.STALE for e in fleet.engines):
                return

    async def _train(self, step: int) -> None:
        buffer = self._loop.buffer
        while not (
            leased := await buffer.lease_step(RUN_ID, term=self._term, step=step, max_wait_s=10)
        ).groups:
            pass  # each call waits
        ids = [g.prompt_id for g in leased.groups]
        tokens = 0
        async for _, payload in buffer.fetch_groups(RUN_ID, prompt_ids=ids):
            tokens += sum(len(s.tokens) for s in open_group(payload).samples)
        assert tokens >= GROUPS * SAMPLES
        await asyncio.sleep(self._train_s)
        await buffer.commit_step(RUN_ID, term=self._term, step=step, prompt_ids=ids)
        await self._publish(step)

    async def _publish(self, label: int) -> None:
        """A weight transaction over every engine, with one tensor in a folder."""
        router = self._loop.router
        prepared = await router.prepare_weights(
            t.PrepareRequest(
                run_id=RUN_ID,
                term=self._term,
                label=label,
                manifest=(_WEIGHT,),
                transport=t.Transport.DISK,
                pause_mode=t.PauseMode.IN_PLACE,
                timeout_s=CALL_S,
            )
        )
        handle = t.HandlesOfEngine(handles=(str(self._loop.folder).encode(),))
        header = t.BucketHeader(
            transaction_id=prepared.transaction_id,
            fleet_epoch=prepared.fleet_epoch,
            bucket_index=0,
            tensors=(_WEIGHT,),
            handles=(handle,),
            size_bytes=4,
        )
        async for ack in router.update_weights(_one(header), timeout_s=CALL_S):
            assert all(a.ok for a in ack.acks), ack
        await router.commit_weights(
            prepared.transaction_id, fleet_epoch=prepared.fleet_epoch, term=self._term, num_buckets=1
        )


async def _one(header: t.BucketHeader) -> AsyncIterator[t.BucketHeader]:
    yield header
