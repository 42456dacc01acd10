"""Client of a rollout gateway."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from milepost import tracing
from milepost import types as t
from milepost.client.base import ServiceClient, closing, duration
from milepost.convert import from_proto, to_proto
from milepost.v1 import rollout_pb2 as pb
from milepost.v1 import rollout_pb2_grpc


class RolloutClient(ServiceClient):
    """RolloutService."""

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(address, **options)
        self._stub: Any = rollout_pb2_grpc.RolloutServiceStub(self._channel)

    async def rollout(
        self,
        prompts: AsyncIterable[t.Prompt],
        *,
        options: t.RolloutOptions | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[t.Trajectories]:
        """Streams prompts in and scored trajectories out, in the order they finish; never retried."""

        traceparent = tracing.active()

        async def requests() -> AsyncGenerator[Any]:
            yield pb.RolloutRequest(options=to_proto(options or t.RolloutOptions()))
            async with closing(prompts) as each:
                async for prompt in each:
                    request = pb.RolloutRequest(prompts=[to_proto(prompt)])
                    tracing.mark(request.prompts, traceparent)
                    yield request

        call = self._exchange(self._stub.Rollout, requests(), timeout_s=timeout_s)
        async with aclosing(call) as messages:
            async for message in messages:
                yield from_proto(t.Trajectories, message)

    async def get_status(self) -> t.RolloutStatus:
        """What the gateway is doing."""
        return from_proto(t.RolloutStatus, await self._call(self._stub.GetStatus, pb.GetStatusRequest()))

    async def pause(self) -> int:
        """Leases no more prompts; returns the groups still in flight."""
        return (await self._call(self._stub.Pause, pb.PauseRequest())).groups_in_flight

    async def resume(self) -> None:
        """Leases prompts again."""
        await self._call(self._stub.Resume, pb.ResumeRequest())

    async def evaluate(
        self,
        prompts: Sequence[t.Prompt] = (),
        *,
        run_id: str = "",
        weight_version: int = 0,
        samples_per_prompt: int = 0,
        sampling: t.SamplingParams | None = None,
        reward: str = "",
        timeout_s: float = 300.0,
    ) -> t.Evaluation:
        """Rolls held-out prompts out at one weight version and scores them."""
        request = pb.EvaluateRequest(
            prompts=[to_proto(p) for p in prompts],
            run_id=run_id,
            weight_version=weight_version,
            samples_per_prompt=samples_per_prompt,
            sampling=to_proto(sampling) if sampling else None,
            reward=reward,
            timeout=duration(timeout_s),
        )
        return from_proto(t.Evaluation, await self._call(self._stub.Evaluate, request, wait_s=timeout_s))
