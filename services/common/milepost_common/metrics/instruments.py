"""Instruments: plain numbers that the code changes where things happen, read from another thread later.

    requests = Counter(Spec("milepost_proxy_requests", Kind.COUNTER, "...", labels=("outcome",)))
    ok = requests.cell("ok")
    ok.value += 1                      # on a hot path: one attribute, about 30 ns
    requests.add("engine_failed")      # elsewhere: a look-up more

One thread writes an instrument; any thread may read it, and may see a number that is one write old. Labels
are values of small sets (states, outcomes, engines, runs), never of prompts or requests; an instrument keeps
at most `MAX_SERIES` of them, and what comes after is counted under `OTHER`.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

MAX_SERIES = 512
OTHER = "other"

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Bounds of histograms of times, from a call in memory to a rollout."""

Labels = tuple[str, ...]
_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9:]+")
_SUFFIXES = {"s": "_seconds", "By": "_bytes"}


class Kind(Enum):
    """What a metric is to Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Spec:
    """What a metric is called and what it means.

    Attributes:
      name: as OpenTelemetry has it, without Prometheus's `_total`.
      kind: counter, gauge or histogram.
      means: what it counts, one sentence.
      labels: names of its labels.
      unit: `s`, `By`, or what is counted (`token`); `1` for a share.
      when_bad: how a bad value looks and what to do; empty where there is none.
      bounds: upper bounds of a histogram's buckets.
    """

    name: str
    kind: Kind
    means: str
    labels: Labels = ()
    unit: str = "1"
    when_bad: str = ""
    bounds: tuple[float, ...] = SECONDS

    @property
    def prometheus_name(self) -> str:
        """As it stands in a query; a histogram's has `_bucket`, `_sum` and `_count` after it."""
        name = _NOT_IN_NAMES.sub("_", self.name)
        return f"{name}_total" if self.kind is Kind.COUNTER else name

    @property
    def exported_unit(self) -> str:
        """Unit in OpenTelemetry's terms; in braces where the name must not get it as a suffix."""
        if self.unit == "1" or self.name.endswith(_SUFFIXES.get(self.unit, "\0")):
            return self.unit
        return f"{{{self.unit}}}"


@dataclass(frozen=True, slots=True)
class Buckets:
    """What a histogram knows at one moment.

    Attributes:
      counts: observations by bucket, the last one above every bound.
      total: sum of all observations.
    """

    counts: tuple[int, ...]
    total: float


Reading = tuple[Labels, float] | tuple[Labels, Buckets]


class Instrument(ABC):
    """Something that can be read."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @abstractmethod
    def read(self) -> Iterable[Reading]:
        """Every series as it stands now."""


class Cell:
    """One number."""

    __slots__ = ("value",)

    def __init__(self, value: float = 0) -> None:
        self.value = value


class _Cells(Instrument):
    """Numbers by label."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._cells: dict[Labels, Cell] = {}
        if not spec.labels:
            self.cell()

    def cell(self, *labels: str) -> Cell:
        """The number of these label values, to be changed in place; it is exported from now on."""
        found = self._cells.get(labels)
        if found is None:
            if len(self._cells) >= MAX_SERIES:
                labels = (OTHER,) * len(self.spec.labels)
            found = self._cells.setdefault(labels, Cell())
        return found

    def value(self, *labels: str) -> float:
        """The number as it stands; 0 where nothing was written."""
        found = self._cells.get(labels)
        return found.value if found else 0

    def read(self) -> Iterable[Reading]:
        """Every number."""
        return [(labels, cell.value) for labels, cell in self._cells.copy().items()]


class Counter(_Cells):
    """Grows; a rate is what is looked at."""

    def add(self, *labels: str, amount: float = 1) -> None:
        """Counts."""
        self.cell(*labels).value += amount


class Gauge(_Cells):
    """Goes up and down. A gauge that nobody set yet is not exported: there is no value, not even 0."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._cells.clear()

    def set(self, value: float, *labels: str) -> None:
        """States the value."""
        self.cell(*labels).value = value


class Series:
    """A histogram's series."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def record(self, value: float) -> None:
        """Adds an observation."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class Histogram(Instrument):
    """Observations by size."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._series: dict[Labels, Series] = {}
        if not spec.labels:
            self.series()

    def series(self, *labels: str) -> Series:
        """The series of these label values, to record into."""
        found = self._series.get(labels)
        if found is None:
            if len(self._series) >= MAX_SERIES:
                labels = (OTHER,) * len(self.spec.labels)
            found = self._series.setdefault(labels, Series(self.spec.bounds))
        return found

    def record(self, value: float, *labels: str) -> None:
        """Adds an observation."""
        self.series(*labels).record(value)

    def read(self) -> Iterable[Reading]:
        """Every series."""
        return [
            (labels, Buckets(tuple(series.counts), series.total))
            for labels, series in self._series.copy().items()
        ]


class Phases(Instrument):
    """Seconds spent in each of several phases, of which one is on at any time: a counter by phase.

    The phase that is on is counted up to the moment of reading.

    Args:
      spec: a counter whose last label is the phase.
      first: the phase to begin with.
      labels: values of the labels before it.
      clock: seconds, monotonic.
    """

    def __init__(
        self, spec: Spec, *, first: str, labels: Labels = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(spec)
        self._labels, self._clock = labels, clock
        self._now = (first, clock())
        self._spent: dict[str, float] = {first: 0.0}

    @property
    def phase(self) -> str:
        """The one that is on."""
        return self._now[0]

    def enter(self, phase: str) -> None:
        """The phase is on from now; entering it again changes nothing."""
        before, since = self._now
        if phase == before:
            return
        now = self._clock()
        self._spent[before] += now - since
        self._spent.setdefault(phase, 0.0)
        self._now = (phase, now)

    def read(self) -> Iterable[Reading]:
        """Seconds by phase."""
        (on, since), spent = self._now, self._spent.copy()
        spent[on] = spent.get(on, 0.0) + max(0.0, self._clock() - since)
        return [((*self._labels, phase), seconds) for phase, seconds in spent.items()]


class Watched(Instrument):
    """Numbers that somebody else keeps, looked up when they are asked for.

    Args:
      spec: a counter or a gauge.
      look: gives every series as it stands; called on any thread, so that it only reads. Where it stumbles
        over something that changed meanwhile it is asked again.
    """

    _TRIES = 3

    def __init__(self, spec: Spec, look: Callable[[], Iterable[tuple[Labels, float]]]) -> None:
        super().__init__(spec)
        self._look = look

    def read(self) -> Iterable[Reading]:
        """Every series."""
        for _ in range(self._TRIES - 1):
            try:
                return list(self._look())
            except RuntimeError:  # a dict or set grew under us
                continue
        return list(self._look())
