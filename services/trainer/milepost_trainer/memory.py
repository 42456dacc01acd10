"""How much memory a rank held at most since a step began.

On CUDA what torch's allocator gave out and what it took from the device; everywhere the memory of the process
(its resident set). Linux forgets the peak of a process on request; where it does not, the peak is that of
the process's whole life.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class MemoryPeaks:
    """Most bytes at once.

    Attributes:
        allocated: tensors on the device; 0 without one.
        reserved: what the allocator took from the device for them; 0 without one.
        process: resident memory of the process.
    """

    allocated: int = 0
    reserved: int = 0
    process: int = 0

    def numbers(self) -> tuple[int, int, int]:
        """In this order."""
        return astuple(self)


class PeakMeter:
    """Measures one rank.

    Args:
        device: where its model lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Forget the peaks."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            return  # another system, or a container that does not let us

    def read(self) -> MemoryPeaks:
        """The peaks since."""
        process = _resident_peak()
        if self._device.type != "cuda":
            return MemoryPeaks(process=process)
        return MemoryPeaks(
            allocated=torch.cuda.max_memory_allocated(self._device),
            reserved=torch.cuda.max_memory_reserved(self._device),
            process=process,
        )


def _resident_peak() -> int:
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def over_ranks(mine: MemoryPeaks, *, rank: int, size: int) -> list[float]:
    """This rank's peaks among places for those of all: summed over ranks, they stand side by side."""
    places = [0.0] * (3 * size)
    places[3 * rank : 3 * rank + 3] = [float(number) for number in mine.numbers()]
    return places


def largest(places: list[float]) -> MemoryPeaks:
    """Each peak of the rank that has most of it, from the sum of ``over_ranks``."""
    return MemoryPeaks(*(int(max(places[kind::3])) for kind in range(3)))
