"""Puts the gateway together and runs it until it is told to stop.

    EngineClient, SampleSlots --> Sampler --+
    WorkerPool --> Scorer ------------------+--> GroupRoller --> Gateway (a run), RolloutStream, Evaluator
    Tokenizer ------------------------------+

Parts know one another only in the direction of the arrows. What is opened here is closed here, in reverse.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from milepost.channel import NO_RETRY, RetryPolicy
from milepost.client.base import ServiceClient
from milepost.client.buffer import BufferClient
from milepost.client.reward import EnvironmentClient
from milepost.client.router import RouterClient
from milepost.client.weights import WeightClient
from milepost.errors import InvalidArgument, MilepostError
from milepost.types import RunConfig, SamplingParams
from milepost.v1 import rollout_pb2_grpc
from milepost_common.metrics.export import serving
from milepost_common.process import announce
from milepost_common.server import GrpcServer
from milepost_rollout.capacity import SampleSlots
from milepost_rollout.engine_client import EngineClient
from milepost_rollout.episode import EpisodeLimits, EpisodeRunner
from milepost_rollout.evaluate import EvaluationRequest, Evaluator, PeriodicEvaluation, load_prompts
from milepost_rollout.fleet_view import FleetView
from milepost_rollout.gateway import Gateway, GatewaySettings
from milepost_rollout.rewards.pool import WorkerPool
from milepost_rollout.rewards.scorer import Scorer
from milepost_rollout.roller import GroupRoller
from milepost_rollout.rollout_servicer import RolloutServicer
from milepost_rollout.sampler import Sampler, SamplerSettings
from milepost_rollout.settings import RolloutSettings
from milepost_rollout.status import Counters
from milepost_rollout.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FAILED, BAD_SETTINGS = 1, 2
_BRIEF = RetryPolicy(retry_for_s=1.0)
"""The gateway's loops ask the ledger again by themselves, and tell meanwhile what they wait for."""

SERVICE = "milepost.v1.RolloutService"
C = TypeVar("C", bound=ServiceClient)


async def serve(settings: RolloutSettings, stop: asyncio.Event) -> int:
    """Runs the gateway; returns its exit status: 0 after a clean stop, 2 when a setting or the run's reward
    cannot be used, 1 after any other error; either was logged."""
    try:
        async with AsyncExitStack() as stack:
            await _run(settings, stack, stop)
    except MilepostError as error:
        log.error("%s", error)
        return BAD_SETTINGS if isinstance(error, InvalidArgument) else FAILED
    return 0


@dataclass(kw_only=True)
class _Parts:
    """What rolls prompts out, and what runs beside it."""

    settings: RolloutSettings
    stack: AsyncExitStack
    instance_id: str
    counters: Counters
    background: list[Callable[[], Coroutine[Any, Any, None]]]

    async def own(self, client: C) -> C:
        """Opens a client and closes it at the end."""
        return await self.stack.enter_async_context(client)


async def _run(settings: RolloutSettings, stack: AsyncExitStack, stop: asyncio.Event) -> None:
    parts = _Parts(
        settings=settings,
        stack=stack,
        instance_id=uuid.uuid4().hex[:12],
        counters=Counters(),
        background=[],
    )
    scorer = _scorer(parts)
    roller = await _roller(parts, scorer)
    gateway = await _gateway(parts, roller, scorer)
    evaluator = await _evaluator(parts, roller, gateway)
    server = GrpcServer(listen=settings.listen, advertise=settings.advertise)
    servicer = RolloutServicer(
        roller=roller,
        evaluator=evaluator,
        counters=parts.counters,
        check_reward=scorer.check,
        max_concurrent_samples=settings.max_concurrent_samples,
        gateway=gateway,
        instance_id=parts.instance_id,
        run_id=settings.run_id if gateway else "",
    )
    server.add(rollout_pb2_grpc.add_RolloutServiceServicer_to_server, servicer, SERVICE)
    instruments = [
        *server.meter.instruments,
        *parts.counters.instruments,
        *roller.instruments,
        *(gateway.instruments if gateway else ()),
    ]
    async with (
        server,
        serving(
            "rollout", instruments, listen=settings.metrics_listen, telemetry=settings.telemetry
        ) as metrics,
    ):
        await server.start()
        announce("rollout", grpc=server.address, metrics=metrics)
        main = gateway.run(stop) if gateway else stop.wait()
        await _until_done(main, parts.background)


async def _until_done(
    main: Awaitable[Any], background: Sequence[Callable[[], Coroutine[Any, Any, None]]]
) -> None:
    """Runs `main` to its end with the others beside it, which are cancelled then; their errors end it."""
    first = asyncio.ensure_future(main)
    tasks = [first, *(asyncio.ensure_future(start()) for start in background)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        await first
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _scorer(parts: _Parts) -> Scorer:
    settings = parts.settings
    pool = WorkerPool(
        size=settings.reward_workers,
        timeout_s=settings.reward_timeout_s,
        reward_path=[str(Path(p).expanduser()) for p in settings.reward_path],
    )
    scorer = Scorer(pool, timeout_s=settings.reward_timeout_s)
    parts.stack.push_async_callback(scorer.close)
    return scorer


async def _roller(parts: _Parts, scorer: Scorer) -> GroupRoller:
    settings = parts.settings
    tokenizer = Tokenizer.load(settings.tokenizer) if settings.tokenizer else None
    client = EngineClient(settings.router_http, stream=settings.stream)
    parts.stack.push_async_callback(client.close)
    fleet: FleetView | None = None
    if settings.router:
        fleet = FleetView(
            await parts.own(RouterClient(settings.router, retry=NO_RETRY)), run_id=settings.run_id
        )
        parts.background.append(fleet.run)
    sampler = Sampler(
        client,
        slots=SampleSlots(settings.max_concurrent_samples, evaluation_limit=_evaluation_limit(settings)),
        settings=SamplerSettings(
            timeout_s=settings.sample_timeout_s,
            attempts=settings.engine_attempts,
            keep_partial=settings.keep_partial,
        ),
        counters=parts.counters,
        context_length=lambda: fleet.context_length if fleet else 0,
        instance_id=parts.instance_id,
    )
    episodes = await _episodes(parts, sampler, tokenizer) if settings.environment else None
    return GroupRoller(
        sampler=sampler, scorer=scorer, tokenizer=tokenizer, counters=parts.counters, episodes=episodes
    )


def _evaluation_limit(settings: RolloutSettings) -> int:
    return settings.evaluate.max_concurrent_samples or max(1, settings.max_concurrent_samples // 2)


async def _episodes(parts: _Parts, sampler: Sampler, tokenizer: Tokenizer | None) -> EpisodeRunner:
    settings = parts.settings
    address = settings.environment.removeprefix("grpc://")
    if tokenizer is None or address == settings.environment:
        raise InvalidArgument(
            f"rollout.environment = {settings.environment!r}: it must be grpc://host:port, and "
            "rollout.tokenizer must be set, for what the environment says has to become tokens",
            reason="BAD_SETTING",
        )
    client = await parts.own(EnvironmentClient(address, retry=NO_RETRY))
    limits = EpisodeLimits(max_turns=settings.max_turns, timeout_s=settings.environment_timeout_s)
    return EpisodeRunner(client, sampler=sampler, tokenizer=tokenizer, limits=limits)


async def _gateway(parts: _Parts, roller: GroupRoller, scorer: Scorer) -> Gateway | None:
    settings = parts.settings
    if not (settings.buffer and settings.run_id):
        return None
    if not settings.tokenizer:
        raise InvalidArgument(
            "rollout.tokenizer is not set; a gateway of a run needs it for prompts and rewards of text: "
            "name the model's folder",
            reason="BAD_SETTING",
        )
    return Gateway(
        await parts.own(BufferClient(settings.buffer, timeout_s=settings.ledger_timeout_s, retry=_BRIEF)),
        roller=roller,
        settings=GatewaySettings(
            run_id=settings.run_id,
            gateway_id=settings.gateway_id or _default_name(settings, parts.instance_id),
            instance_id=parts.instance_id,
            max_concurrent_samples=settings.max_concurrent_samples,
            drain_s=settings.drain_s,
        ),
        counters=parts.counters,
        check_reward=scorer.check,
    )


def _default_name(settings: RolloutSettings, instance_id: str) -> str:
    """Host and port, the same at each start; with a free port nothing is the same, so it is the instance."""
    address = settings.advertise or settings.listen
    return f"{platform.node()}/{instance_id if address.endswith(':0') else address}"


async def _no_run() -> RunConfig:
    return RunConfig()


async def _evaluator(parts: _Parts, roller: GroupRoller, gateway: Gateway | None) -> Evaluator:
    settings = parts.settings.evaluate
    versions: WeightClient | None = None
    if gateway:
        client = WeightClient(parts.settings.buffer, timeout_s=parts.settings.ledger_timeout_s)
        versions = await parts.own(client)
    evaluator = Evaluator(
        roller=roller,
        config=gateway.config if gateway else _no_run,
        counters=parts.counters,
        versions=versions,
        run_id=parts.settings.run_id,
        prompts=load_prompts(settings.prompts) if settings.prompts else (),
    )
    if settings.every_steps and versions is not None:
        run_id = parts.settings.run_id
        periodic = PeriodicEvaluation(
            evaluator,
            versions=versions,
            run_id=run_id,
            every_steps=settings.every_steps,
            request=EvaluationRequest(
                samples_per_prompt=settings.samples_per_prompt,
                sampling=SamplingParams(temperature=settings.temperature),
                reward=settings.reward,
                timeout_s=settings.timeout_s,
            ),
            results=Path(settings.results.format(run_id=run_id)),
        )
        parts.background.append(periodic.run)
    return evaluator
