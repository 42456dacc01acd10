"""Client of a trainer's control surface."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from milepost import types as t
from milepost.client.base import ServiceClient, duration
from milepost.convert import from_proto
from milepost.v1 import trainer_pb2 as pb
from milepost.v1 import trainer_pb2_grpc


class TrainerClient(ServiceClient):
    """TrainerService."""

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(address, **options)
        self._stub: Any = trainer_pb2_grpc.TrainerServiceStub(self._channel)

    async def get_trainer_status(self) -> t.TrainerStatus:
        """What the trainer is doing."""
        reply = await self._call(self._stub.GetTrainerStatus, pb.GetTrainerStatusRequest())
        return from_proto(t.TrainerStatus, reply)

    async def save_checkpoint(self, *, max_wait_s: float | None = None) -> t.SavedCheckpoint:
        """Saves a checkpoint after the current step."""
        request = pb.SaveCheckpointRequest(max_wait=duration(max_wait_s))
        reply = await self._call(self._stub.SaveCheckpoint, request, wait_s=max_wait_s)
        return from_proto(t.SavedCheckpoint, reply)

    async def pause_training(self) -> int:
        """Stops before the next step; returns the step after which it stands."""
        return (await self._call(self._stub.PauseTraining, pb.PauseTrainingRequest())).step

    async def resume_training(self) -> None:
        """Goes on."""
        await self._call(self._stub.ResumeTraining, pb.ResumeTrainingRequest())

    async def watch_steps(
        self, *, after_step: int = 0, max_wait_s: float = 60.0
    ) -> AsyncIterator[t.StepMetrics]:
        """Streams the metrics of each step; ends with the run, or after `max_wait_s` without a step."""
        request = pb.WatchStepsRequest(after_step=after_step, max_wait=duration(max_wait_s))
        async for message in self._stream(self._stub.WatchSteps, request, quiet_s=max_wait_s):
            yield from_proto(t.StepMetrics, message)
