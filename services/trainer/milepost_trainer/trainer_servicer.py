"""TrainerService over the trainer's state: protobuf in, protobuf out, nothing decided here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from milepost.convert import to_proto
from milepost.errors import InvalidArgument
from milepost.types import SavedCheckpoint
from milepost.v1 import trainer_pb2 as pb
from milepost.v1 import trainer_pb2_grpc
from milepost_trainer.status import TrainerState

SERVICE = "milepost.v1.TrainerService"
_MAX_WAIT_S = 3600.0
_MAX_QUIET_S, _QUIET_S = 300.0, 60.0
_LOOK_AGAIN_S = 5.0


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """The control surface of rank 0."""

    def __init__(self, state: TrainerState) -> None:
        self._state = state

    async def GetTrainerStatus(self, request: Any, context: Any) -> Any:
        """What the trainer is doing."""
        return to_proto(self._state.snapshot())

    async def SaveCheckpoint(self, request: Any, context: Any) -> Any:
        """Asks for a checkpoint and waits for it as long as the caller wishes."""
        wait_s = _max_wait_s(request, default=0.0, most=_MAX_WAIT_S)
        state = self._state
        if state.phase != "finished":
            state.ask_save()
        deadline = asyncio.get_running_loop().time() + wait_s
        while state.save_wanted and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await state.wait_for_news(timeout_s=min(left, _LOOK_AGAIN_S))
        return to_proto(SavedCheckpoint() if state.save_wanted else state.checkpoint)

    async def PauseTraining(self, request: Any, context: Any) -> Any:
        """Stops before the next step."""
        self._state.ask_pause(True)
        return pb.PauseTrainingResponse(step=self._state.step)

    async def ResumeTraining(self, request: Any, context: Any) -> Any:
        """Goes on."""
        self._state.ask_pause(False)
        return pb.ResumeTrainingResponse()

    async def WatchSteps(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Streams steps as they come, those in memory first; ends with the trainer, or for quiet."""
        quiet_s = _max_wait_s(request, default=_QUIET_S, most=_MAX_QUIET_S)
        clock = asyncio.get_running_loop().time
        state, seen = self._state, int(request.after_step)
        last: Any = None
        until = clock() + quiet_s
        while True:
            for entry in list(state.steps):
                if entry.step > seen:
                    yield to_proto(entry)
                    seen, last, until = entry.step, entry, clock() + quiet_s
            if state.phase == "finished" and (not state.steps or state.steps[-1] is last):
                return
            if state.phase == "finished" and state.steps[-1].step <= seen:
                return
            if (left := until - clock()) <= 0:
                return
            await state.wait_for_news(timeout_s=min(left, _LOOK_AGAIN_S))


def _max_wait_s(request: Any, *, default: float, most: float) -> float:
    """The field `max_wait` in seconds.

    Raises:
        InvalidArgument: it is negative or too long.
    """
    if not request.HasField("max_wait"):
        return default
    wait_s = request.max_wait.ToNanoseconds() / 1e9
    if not 0 <= wait_s <= most:
        raise InvalidArgument(f"max_wait = {wait_s:g} s: give 0 to {most:.0f} s")
    return wait_s
