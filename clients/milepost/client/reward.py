"""Clients of rewards and environments that users implement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from milepost import types as t
from milepost.client.base import ServiceClient
from milepost.convert import from_proto, to_proto
from milepost.v1 import reward_pb2 as pb
from milepost.v1 import reward_pb2_grpc


class RewardClient(ServiceClient):
    """RewardService."""

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(address, **options)
        self._stub: Any = reward_pb2_grpc.RewardServiceStub(self._channel)

    async def score(
        self, prompt: t.Prompt, *, samples: Sequence[t.Sample], timeout_s: float | None = None
    ) -> t.Scores:
        """Scores the samples of one prompt together."""
        request = pb.ScoreRequest(prompt=to_proto(prompt), samples=[to_proto(s) for s in samples])
        return from_proto(t.Scores, await self._call(self._stub.Score, request, timeout_s=timeout_s))


class EnvironmentClient(ServiceClient):
    """EnvironmentService."""

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(address, **options)
        self._stub: Any = reward_pb2_grpc.EnvironmentServiceStub(self._channel)

    async def reset(
        self, episode_id: str, *, prompt: t.Prompt, timeout_s: float | None = None
    ) -> tuple[t.ChatMessage, ...]:
        """Starts an episode; returns the messages that come before the model speaks."""
        request = pb.ResetRequest(episode_id=episode_id, prompt=to_proto(prompt))
        reply = await self._call(self._stub.Reset, request, timeout_s=timeout_s)
        return tuple(from_proto(t.ChatMessage, m) for m in reply.messages)

    async def step(self, episode_id: str, *, text: str, timeout_s: float | None = None) -> t.EnvironmentTurn:
        """Tells the environment what the model said."""
        request = pb.StepRequest(episode_id=episode_id, text=text)
        return from_proto(t.EnvironmentTurn, await self._call(self._stub.Step, request, timeout_s=timeout_s))
