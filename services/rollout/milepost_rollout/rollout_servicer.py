"""RolloutService over gRPC: protobuf here, dataclasses behind."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from milepost.convert import from_proto, to_proto
from milepost.errors import FailedPrecondition
from milepost.types import Prompt, RolloutOptions, RolloutStatus, SamplingParams
from milepost.v1 import rollout_pb2, rollout_pb2_grpc
from milepost_rollout.evaluate import EvaluationRequest, Evaluator
from milepost_rollout.gateway import Gateway
from milepost_rollout.roller import GroupRoller
from milepost_rollout.status import Counters
from milepost_rollout.stream import RolloutStream


class RolloutServicer(rollout_pb2_grpc.RolloutServiceServicer):
    """Serves streams, evaluations and the control of the training side.

    Args:
      roller: rolls prompts out.
      evaluator: evaluates.
      counters: what was done so far.
      check_reward: raises InvalidArgument for a reward that cannot be used.
      max_concurrent_samples: bounds the groups of a stream that names no bound.
      gateway: the training side; None when there is none.
      instance_id: new at each start.
      run_id: the gateway's run; empty when it runs standalone.
    """

    def __init__(
        self,
        *,
        roller: GroupRoller,
        evaluator: Evaluator,
        counters: Counters,
        check_reward: Callable[[str], Awaitable[None]],
        max_concurrent_samples: int,
        gateway: Gateway | None,
        instance_id: str,
        run_id: str,
    ) -> None:
        self._roller = roller
        self._evaluator = evaluator
        self._counters = counters
        self._check_reward = check_reward
        self._max_concurrent_samples = max_concurrent_samples
        self._gateway = gateway
        self._instance_id = instance_id
        self._run_id = run_id
        self._streams = itertools.count()

    async def Rollout(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Streams trajectories."""
        first = await anext(request_iterator, None)
        if first is None:
            return
        options = from_proto(RolloutOptions, first.options)
        await self._check_reward(options.reward)
        stream = RolloutStream(
            self._roller,
            options=options,
            limit=self._group_limit(options),
            name=f"{self._instance_id}/{next(self._streams)}",
        )
        async for trajectories in stream.run(_prompts(first, request_iterator)):
            yield to_proto(trajectories)

    def _group_limit(self, options: RolloutOptions) -> int:
        if options.max_concurrent_groups:
            return options.max_concurrent_groups
        return max(1, self._max_concurrent_samples // max(1, options.samples_per_prompt))

    async def GetStatus(self, request: Any, context: Any) -> Any:
        """The status."""
        counters, gateway = self._counters, self._gateway
        return to_proto(
            RolloutStatus(
                instance_id=self._instance_id,
                run_id=self._run_id,
                paused=gateway is not None and gateway.paused,
                groups_in_flight=gateway.groups_in_flight if gateway else 0,
                samples_in_flight=counters.samples_in_flight,
                groups_sealed=counters.groups_sealed,
                tokens_generated=counters.tokens_generated,
                outcomes=dict(counters.outcomes),
                reward_mean=counters.reward_mean,
                waiting_for=counters.waiting_for,
                last_evaluation=counters.last_evaluation,
                uptime_s=counters.uptime_s,
            )
        )

    async def Pause(self, request: Any, context: Any) -> Any:
        """Stops leasing."""
        gateway = self._training()
        gateway.pause()
        return rollout_pb2.PauseResponse(groups_in_flight=gateway.groups_in_flight)

    async def Resume(self, request: Any, context: Any) -> Any:
        """Leases again."""
        self._training().resume()
        return rollout_pb2.ResumeResponse()

    async def Evaluate(self, request: Any, context: Any) -> Any:
        """Evaluates."""
        evaluation = await self._evaluator.evaluate(
            EvaluationRequest(
                prompts=[from_proto(Prompt, p) for p in request.prompts],
                run_id=request.run_id,
                weight_version=request.weight_version,
                samples_per_prompt=request.samples_per_prompt,
                sampling=from_proto(SamplingParams, request.sampling)
                if request.HasField("sampling")
                else None,
                reward=request.reward,
                timeout_s=request.timeout.ToNanoseconds() / 1e9 if request.HasField("timeout") else 0.0,
            )
        )
        return to_proto(evaluation)

    def _training(self) -> Gateway:
        if self._gateway is None:
            raise FailedPrecondition(
                "the gateway runs standalone and leases no prompts; set rollout.buffer and rollout.run_id",
                reason="STANDALONE",
            )
        return self._gateway


async def _prompts(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Prompt]:
    for message in first.prompts:
        yield from_proto(Prompt, message)
    async for request in rest:
        for message in request.prompts:
            yield from_proto(Prompt, message)
