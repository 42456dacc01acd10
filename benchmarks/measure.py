"""What a benchmark measures with: CPU seconds of processes from /proc, and sides that take turns.

    ours, reference = await take_turns(size.runs, ours=one_run, reference=other_run)
    row = ratio_row("router_small", ours, reference, unit="us of CPU per request", target=0.75)

CPU is user and system time of every thread, in nanoseconds (`/proc/<pid>/task/*/schedstat`). Where threads
ended in between the process's own account counts, in ticks of 10 ms.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_UTIME, _STIME, _PPID = 11, 12, 1
"""Places in /proc/<pid>/stat, counted after the command's closing parenthesis."""

Side = Callable[[], Awaitable[float]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much a benchmark does.

    Attributes:
      runs: measured runs of each side; a median is over these.
      scale: work of one run, 1.0 being what the targets are judged at.
    """

    runs: int = 5
    scale: float = 1.0

    def of(self, full: int, *, least: int) -> int:
        """`full` at scale 1, less at a smaller one."""
        return max(least, round(full * self.scale))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
      ours, reference: medians, in `unit`.
      ratio: ours / reference.
      target: the ratio must not be above it; None: told, not judged.
      compared: what the reference is.
      runs: every single measurement by side, in the order in which they were made.
      more: other numbers of the same runs.
    """

    name: str
    ours: float
    reference: float
    unit: str
    ratio: float
    target: float | None
    met: bool
    compared: str
    runs: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    more: dict[str, Any] = field(default_factory=dict[str, Any])

    def as_json(self) -> dict[str, Any]:
        """The row as `results.json` keeps it."""
        return asdict(self)


def ratio_row(
    name: str,
    runs: dict[str, list[float]],
    *,
    unit: str,
    target: float | None,
    compared: str,
    more: dict[str, Any] | None = None,
) -> Row:
    """A row of the medians of `runs["ours"]` and `runs["reference"]`."""
    ours, reference = median(runs["ours"]), median(runs["reference"])
    ratio = ours / reference
    met = target is None or ratio <= target
    return Row(
        name=name,
        ours=ours,
        reference=reference,
        unit=unit,
        ratio=ratio,
        target=target,
        met=met,
        compared=compared,
        runs=runs,
        more=more or {},
    )


async def take_turns(runs: int, **sides: Side) -> dict[str, list[float]]:
    """Runs the sides in turns, first one first and then the other, after one run of each that is not kept."""
    kept: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for name in order:
        await sides[name]()
    for _ in range(runs):
        for name in order:
            kept[name].append(await sides[name]())
        order.reverse()
    return kept


# ---------------------------------------------------------------------------------------------- CPU


@dataclass(frozen=True, slots=True)
class _Account:
    """CPU seconds of one process: by its living threads, and of all that it ever had, in ticks."""

    threads: dict[str, int]
    total_s: float


class CpuMeter:
    """CPU seconds that processes and their descendants use from its making on.

    Descendants that start later count from their start; processes that ended are lost, so a benchmark reads
    the meter while its own live.

    Args:
      roots: process ids.
    """

    def __init__(self, *roots: int) -> None:
        self._roots = roots
        self._before = {pid: _account(pid) for pid in family(roots)}

    @staticmethod
    def used_by(*roots: int) -> float:
        """CPU seconds of processes and their descendants since these started."""
        return sum(_spent(None, _account(pid)) for pid in family(roots))

    def seconds(self) -> float:
        """CPU seconds since the start."""
        return sum(self.by_process().values())

    def by_process(self) -> dict[int, float]:
        """CPU seconds since the start of each process."""
        now = {pid: _account(pid) for pid in family(self._roots)}
        return {pid: _spent(self._before.get(pid), account) for pid, account in now.items()}


def _spent(before: _Account | None, now: _Account) -> float:
    old = before.threads if before is not None else {}
    if not now.threads:
        return 0.0
    precise_s = sum(ns - old.get(thread, 0) for thread, ns in now.threads.items()) / 1e9
    coarse_s = now.total_s - (before.total_s if before is not None else 0.0)
    ended = not old.keys() <= now.threads.keys()
    return max(precise_s, coarse_s) if ended else precise_s


def _account(pid: int) -> _Account:
    threads: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                threads[task.name] = int((task / "schedstat").read_text().split()[0])
        stat = _stat(pid)
        return _Account(threads, (int(stat[_UTIME]) + int(stat[_STIME])) / TICKS_PER_S)
    return _Account({}, 0.0)


def _stat(pid: int | str) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def family(roots: Iterable[int]) -> list[int]:
    """The processes and all their living descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                children.setdefault(int(_stat(entry)[_PPID]), []).append(int(entry))
            except (FileNotFoundError, ProcessLookupError):
                continue
    found: list[int] = []
    todo = list(roots)
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, ())
    return found
