"""Calls that a gRPC server answered, by method and code; written by `milepost_common.server`."""

from __future__ import annotations

import time

from milepost_common.metrics.instruments import Cell, Counter, Histogram, Instrument, Kind, Series, Spec

CALLS = Spec(
    "milepost_grpc_calls",
    Kind.COUNTER,
    "calls that ended, by method and gRPC status",
    labels=("method", "code"),
    unit="call",
    when_bad="UNAVAILABLE: what this service leans on is away; INTERNAL: a defect, its stack is in the log",
)
CALL_SECONDS = Spec(
    "milepost_grpc_call_seconds",
    Kind.HISTOGRAM,
    "time of unary calls in the server, including the time that a call asked to wait",
    labels=("method",),
    unit="s",
    when_bad="methods that do not wait and grow slow: look at Redis (buffer), at the CPU, at the event loop",
)
SPECS = (CALLS, CALL_SECONDS)

OK = "OK"


class CallMeter:
    """Counts the calls of one server."""

    def __init__(self) -> None:
        self.calls, self.seconds = Counter(CALLS), Histogram(CALL_SECONDS)
        self._known: dict[str, tuple[str, Cell, Series]] = {}

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """What it writes."""
        return self.calls, self.seconds

    def ended(self, method: str, code: str) -> None:
        """A stream ended."""
        self.calls.add(_short(method), code)

    def answered(self, method: str, code: str, *, started: float) -> None:
        """A unary call ended that began at `started` (`time.perf_counter`)."""
        name, ok, series = self._known.get(method) or self._learn(method)
        series.record(time.perf_counter() - started)
        if code is OK:
            ok.value += 1
        else:
            self.calls.add(name, code)

    def _learn(self, method: str) -> tuple[str, Cell, Series]:
        name = _short(method)
        known = self._known[method] = (name, self.calls.cell(name, OK), self.seconds.series(name))
        return known


def _short(method: str) -> str:
    """`BufferService/LeaseStep` of `/milepost.v1.BufferService/LeaseStep`."""
    return method.rpartition(".")[2]
