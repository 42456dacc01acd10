"""A look inside some steps: `[trainer.profile]`.

    begin_step(first_step) ... last update of the window's last step --> a trace and, on CUDA, a snapshot

One of each for every rank. The trace is a Chrome trace (open it at ui.perfetto.dev), the snapshot torch's
record of every allocation (open it at pytorch.org/memory_viz). Both belong to the thread that trains.
Outside of the window a step costs two comparisons; a window whose end the run does not reach leaves nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from milepost_trainer.settings import ProfileSettings

log = logging.getLogger(__name__)

_MAX_ALLOCATIONS = 1_000_000
_memory: Any = torch.cuda.memory


class StepProfiler:
    """Profiles one rank for the steps of a window.

    Args:
        settings: the window, and the folder.
        rank: whose files these are.
        device: where the model lives.
    """

    def __init__(self, settings: ProfileSettings, *, rank: int, device: torch.device) -> None:
        self._first = settings.first_step
        self._last = settings.first_step + settings.num_steps - 1
        self._directory = Path(settings.dir)
        self._rank = rank
        self._on_cuda = device.type == "cuda"
        self._running: profile | None = None

    def begin_step(self, step: int) -> None:
        """A step begins: the window opens with its first."""
        if step != self._first or self._running is not None:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
        if self._on_cuda:
            _memory._record_memory_history(max_entries=_MAX_ALLOCATIONS)
        self._running = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._running.start()

    @contextlib.contextmanager
    def part(self, name: str) -> Generator[None]:
        """Name a part of the step in the trace."""
        if self._running is None:
            yield
            return
        with record_function(f"milepost::{name}"):
            yield

    def end_step(self, step: int) -> None:
        """A step's last update is done: the window closes with its last."""
        if self._running is None or step < self._last:
            return
        finished, self._running = self._running, None
        finished.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        stem = f"steps_{self._first:08d}-{self._last:08d}.rank_{self._rank}"
        finished.export_chrome_trace(str(self._directory / f"{stem}.trace.json.gz"))
        if self._on_cuda:
            _memory._dump_snapshot(str(self._directory / f"{stem}.memory.pickle"))
            _memory._record_memory_history(enabled=None)
        log.info("profile of steps %d to %d in %s", self._first, self._last, self._directory)
