"""How many samples are at the engines at once, and who goes next.

One number, `limit`; whoever holds a slot has one request at an engine. Evaluation goes before training, but
holds at most `evaluation_limit` slots, so that rollout never stops for it. Among equals it is first come,
first served, and so the samples of several groups interleave.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from enum import IntEnum

from milepost_common.metrics import Instrument, Watched
from milepost_rollout.metrics import SLOTS


class Priority(IntEnum):
    """Who goes first."""

    EVALUATION = 0
    TRAINING = 1


class SampleSlots:
    """Slots for samples; everything happens on one event loop.

    Invariants: `held <= limit`; evaluation holds at most `evaluation_limit`; nobody who could go waits.
    """

    def __init__(self, limit: int, *, evaluation_limit: int | None = None) -> None:
        self.limit = limit
        self.evaluation_limit = min(limit, evaluation_limit or limit)
        self._held = {Priority.EVALUATION: 0, Priority.TRAINING: 0}
        self._waiting: dict[Priority, deque[asyncio.Future[None]]] = {p: deque() for p in Priority}

    @property
    def held(self) -> int:
        """Slots in use."""
        return sum(self._held.values())

    @property
    def waiting(self) -> int:
        """Who waits for a slot."""
        return sum(len(queue) for queue in self._waiting.values())

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """The slots, as metrics."""
        return (
            Watched(
                SLOTS,
                lambda: [(("held",), self.held), (("waited_for",), self.waiting), (("limit",), self.limit)],
            ),
        )

    @asynccontextmanager
    async def hold(self, priority: Priority) -> AsyncGenerator[None]:
        """Waits for a slot and keeps it for the block."""
        await self._acquire(priority)
        try:
            yield
        finally:
            self._held[priority] -= 1
            self._admit()

    async def _acquire(self, priority: Priority) -> None:
        if self._may_go(priority) and not self._waiting[priority]:
            self._held[priority] += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting[priority].append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the slot was given in the same instant
                self._held[priority] -= 1
                self._admit()
            raise

    def _may_go(self, priority: Priority) -> bool:
        if self.held >= self.limit:
            return False
        return priority is Priority.TRAINING or self._held[priority] < self.evaluation_limit

    def _admit(self) -> None:
        for priority in Priority:
            queue = self._waiting[priority]
            while queue and self._may_go(priority):
                turn = queue.popleft()
                if not turn.done():
                    self._held[priority] += 1
                    turn.set_result(None)
