"""Where the wall seconds of one step went, as rank 0 sees it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepTimes:
    """Wall seconds of one step. The first five add up to nearly all of it.

    Attributes:
        wait_s: blocked in LeaseStep, fetching and packing.
        forward_backward_s: forward and backward passes, those included that were made again.
        optimizer_s: clipping and moving the parameters.
        publish_s: giving weights to engines.
        checkpoint_s: saving.
        step_s: from the end of the step before to the end of this one.
        fetch_s: fetching the payloads; beside the step before, with ``trainer.prefetch``.
        pack_s: decoding and packing them; likewise.
    """

    wait_s: float = 0.0
    forward_backward_s: float = 0.0
    optimizer_s: float = 0.0
    publish_s: float = 0.0
    checkpoint_s: float = 0.0
    step_s: float = 0.0
    fetch_s: float = 0.0
    pack_s: float = 0.0

    @property
    def train_s(self) -> float:
        """Forward, backward and optimizer."""
        return self.forward_backward_s + self.optimizer_s


@dataclass
class StepClock:
    """Adds up the parts of a step."""

    started: float = field(default_factory=time.monotonic)
    spent: dict[str, float] = field(default_factory=dict[str, float])

    @contextlib.contextmanager
    def timing(self, part: str) -> Generator[None]:
        """Add the time of a block to a part, named as in ``StepTimes`` without the unit."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.add(part, time.monotonic() - begun)

    def add(self, part: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self.spent[part] = self.spent.get(part, 0.0) + seconds

    def read(self) -> StepTimes:
        """The times so far."""
        parts = {f"{part}_s": seconds for part, seconds in self.spent.items()}
        return StepTimes(**parts, step_s=time.monotonic() - self.started)
