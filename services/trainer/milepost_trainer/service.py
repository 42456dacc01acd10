"""Puts the trainer together and runs it until its run is finished or it is told to stop.

    every rank:  World -> Backend, Objective -> Learner -> Rank (+ a buffer client for its payloads)
    rank 0 too:  Crew, Ledger, Publisher (router client, transport), Saver, Recorder, TrainerState -> StepLoop
                 TrainerServicer on the gRPC port; publisher.watch and crew.keep_alive beside the loop

Parts know one another only in the direction of the arrows. What is opened here is closed here, in reverse.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from milepost import types as t
from milepost.channel import NO_RETRY, RetryPolicy
from milepost.client.buffer import BufferClient
from milepost.client.router import RouterClient
from milepost.errors import DataLoss, DeadlineExceeded, InvalidArgument, MilepostError, StaleTerm, Unavailable
from milepost.v1 import trainer_pb2_grpc
from milepost_common.metrics.export import serving
from milepost_common.process import announce
from milepost_common.server import GrpcServer
from milepost_trainer.backends.base import Backend
from milepost_trainer.backends.fsdp import FsdpBackend
from milepost_trainer.checkpoint import CheckpointStore
from milepost_trainer.crew import Crew, Rank
from milepost_trainer.learner import Learner
from milepost_trainer.ledger import Ledger
from milepost_trainer.logprob_check import LogprobCheck
from milepost_trainer.loop import StepLoop
from milepost_trainer.objectives.build import build_objective
from milepost_trainer.profiler import StepProfiler
from milepost_trainer.publisher import Publisher
from milepost_trainer.recorder import Recorder
from milepost_trainer.run_config import to_run_config
from milepost_trainer.saver import Saver
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.status import TrainerState
from milepost_trainer.trainer_servicer import SERVICE, TrainerServicer
from milepost_trainer.transports.build import build_transport
from milepost_trainer.world import World, join, leave

log = logging.getLogger(__name__)

T = TypeVar("T")

OK, FAILED, BAD_SETTINGS, REPLACED, NOTHING_TRAINED = 0, 1, 2, 3, 4
_FETCH_AGAIN_S = 1.0
_BRIEF = RetryPolicy(retry_for_s=1.0)
"""`Ledger` asks again by itself, for ever, and says so."""


async def serve(settings: TrainerSettings, stop: asyncio.Event) -> int:
    """Run this rank.

    Returns:
        Its exit status: 0 done or stopped, 1 failed, 2 a setting cannot be used, 3 another trainer took over,
        4 the run is over and none of its prompts was trained.
    """
    trained = True
    try:
        async with AsyncExitStack() as stack:
            world, learner = await asyncio.to_thread(build_learner, settings)
            stack.callback(leave, world)
            client = await stack.enter_async_context(
                BufferClient(settings.buffer, retry=NO_RETRY, timeout_s=settings.ledger_timeout_s)
            )
            fetcher = Fetcher(client, settings.run.run_id)
            rank = Rank(world, learner, fetch=fetcher)
            stack.push_async_callback(rank.close)
            await rank.on_thread(lambda: torch.set_num_threads(settings.threads))
            if world.leads:
                trained = await _lead(settings, rank, fetcher, stack, stop)
            else:
                await rank.follow()
    except StaleTerm as error:
        log.error("another trainer took over the run: %s", error)
        return REPLACED
    except (MilepostError, OSError) as error:
        log.error("%s", error)
        return BAD_SETTINGS if isinstance(error, InvalidArgument) else FAILED
    if not trained:
        log.error("nothing was trained: the line before says why each prompt was dropped")
        return NOTHING_TRAINED
    return OK


def build_learner(settings: TrainerSettings) -> tuple[World, Learner]:
    """Join the other ranks and load the model."""
    torch.set_num_threads(settings.threads)
    mixed = settings.compute_dtype not in ("", settings.dtype)
    world = join(timeout_s=settings.collective_timeout_s, device=settings.device, force_group=mixed)
    objective = build_objective(settings.objective)
    backend: Backend = FsdpBackend(settings, world, with_reference=objective.needs_reference)
    return world, Learner(
        backend,
        objective,
        loss_aggregation=settings.objective.loss_aggregation,
        vocab_size=backend.vocab_size,
        profiler=StepProfiler(settings.profile, rank=world.rank, device=world.device),
    )


class Fetcher:
    """Brings payloads, asking again while the buffer is away; what came with a lease is here already."""

    def __init__(self, client: BufferClient, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._came: dict[str, bytes] = {}

    def take(self, lease: t.StepLease) -> None:
        """Keep what came along with the newest lease, in place of what came with the one before."""
        named = zip(lease.groups, lease.payloads, strict=False)
        self._came = {group.prompt_id: payload for group, payload in named}

    async def __call__(self, prompt_ids: Sequence[str]) -> dict[str, bytes]:
        got = {name: self._came.pop(name) for name in prompt_ids if name in self._came}
        while missing := [prompt_id for prompt_id in prompt_ids if prompt_id not in got]:
            try:
                async for prompt_id, payload in self._client.fetch_groups(self._run_id, prompt_ids=missing):
                    got[prompt_id] = payload
                return got
            except (Unavailable, DeadlineExceeded, DataLoss) as error:
                log.warning("%d payloads not fetched yet, asking again: %s", len(missing), error)
            await asyncio.sleep(_FETCH_AGAIN_S)
        return got


async def _lead(
    settings: TrainerSettings, rank: Rank, fetcher: Fetcher, stack: AsyncExitStack, stop: asyncio.Event
) -> bool:
    """Rank 0: lead the others through the run; returns what `StepLoop.run` does."""
    run_id, world = settings.run.run_id, rank.world
    crew = Crew(rank)
    state = TrainerState(run_id=run_id, world_size=world.size)
    buffer = await stack.enter_async_context(
        BufferClient(settings.buffer, retry=_BRIEF, timeout_s=settings.ledger_timeout_s)
    )
    ledger = Ledger(
        buffer,
        run_id=run_id,
        config=to_run_config(settings.run),
        on_payloads=fetcher.take if world.size == 1 else None,  # of several ranks each has its own to fetch
    )
    store = CheckpointStore(Path(settings.checkpoint.dir), run_id=run_id, keep=settings.checkpoint.keep)
    publisher = await _publisher(settings, crew, rank.learner.backend, stack)
    recorder = stack.enter_context(
        Recorder(Path(settings.metrics.dir), tensorboard=settings.metrics.tensorboard)
    )
    loop = StepLoop(
        settings,
        ledger=ledger,
        crew=crew,
        publisher=publisher,
        saver=Saver(store, crew=crew, ledger=ledger, world_size=world.size),
        recorder=recorder,
        state=state,
        stop=stop,
        logprobs=_logprob_check(settings, crew, rank.learner.backend),
    )
    server = GrpcServer(listen=settings.listen, advertise=settings.advertise)
    server.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, TrainerServicer(state), SERVICE)
    instruments = [
        *server.meter.instruments,
        *loop.meter.instruments,
        *state.instruments,
        *publisher.instruments,
    ]
    async with (
        server,
        serving(
            "trainer", instruments, listen=settings.metrics_listen, telemetry=settings.telemetry
        ) as metrics,
    ):
        await server.start()
        running = _run(loop, stop, grpc=server.address, metrics=metrics)
        trained = await _beside(running, [publisher.watch(), crew.keep_alive()])
        await crew.call("stop")
    return trained


async def _run(loop: StepLoop, stop: asyncio.Event, **addresses: str) -> bool:
    """Resume, say so, and train; a stop ends it also while the buffer is away."""
    resuming, stopped = asyncio.create_task(loop.resume()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([resuming, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not resuming.done():
            return True
        resuming.result()
    finally:
        resuming.cancel()
        stopped.cancel()
        await asyncio.gather(resuming, stopped, return_exceptions=True)
    announce("trainer", **addresses)
    return await loop.run()


async def _beside(main: Coroutine[Any, Any, T], others: Sequence[Coroutine[Any, Any, None]]) -> T:
    """Run `main` to its end with the others beside it; an error of any of them ends all."""
    first = asyncio.create_task(main)
    tasks: list[asyncio.Task[Any]] = [first, *(asyncio.create_task(other) for other in others)]
    try:
        pending = set(tasks)
        while not first.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        return first.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _logprob_check(settings: TrainerSettings, crew: Crew, backend: Backend) -> LogprobCheck | None:
    if not settings.debug.check_logprobs:
        return None
    return LogprobCheck(crew, vocab_size=backend.vocab_size, tolerance=settings.debug.logprob_tolerance)


async def _publisher(
    settings: TrainerSettings, crew: Crew, backend: Backend, stack: AsyncExitStack
) -> Publisher:
    transport = build_transport(settings.publish, run_id=settings.run.run_id)
    stack.push_async_callback(transport.shut_down)
    budget = 1 << 62 if transport.single_bucket else settings.publish.bucket_bytes
    buckets = backend.plan_buckets(bucket_bytes=budget, wire_dtype=settings.publish.wire_dtype or None)

    async def gather(bucket: Any) -> torch.Tensor:
        return cast(torch.Tensor, await crew.call("gather_bucket", bucket))

    async def whole() -> Mapping[str, torch.Tensor]:
        return cast(Mapping[str, torch.Tensor], await crew.call("whole_weights", buckets))

    publisher = Publisher(
        await stack.enter_async_context(RouterClient(settings.router, retry=NO_RETRY)),
        transport=transport,
        buckets=buckets,
        gather=gather,
        whole=whole,
        settings=settings.publish,
        run_id=settings.run.run_id,
    )
    stack.push_async_callback(publisher.forget_ahead)
    return publisher
