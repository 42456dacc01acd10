"""Instruments, the page that Prometheus reads, and what a collector is sent."""

from __future__ import annotations

import asyncio
import http.client
import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc import aio
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as otlp
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as otlp_grpc
from prometheus_client.parser import text_string_to_metric_families

from milepost.errors import InvalidArgument, NotFound, Unavailable
from milepost_common.metrics import Counter, Gauge, Histogram, Instrument, Kind, Phases, Spec, Watched, export
from milepost_common.metrics.export import otlp_endpoint, serving
from milepost_common.metrics.instruments import MAX_SERIES, OTHER, Buckets
from milepost_common.server import GrpcServer
from milepost_common.settings import TelemetrySettings

OFF = TelemetrySettings(otlp_endpoint="")
FREE = "127.0.0.1:0"


@pytest.fixture(autouse=True)
def _no_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def page(address: str) -> str:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        connection.request("GET", "/metrics")
        reply = connection.getresponse()
        assert reply.status == 200
        return reply.read().decode()
    finally:
        connection.close()


async def scrape(address: str) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names ...) -> value."""
    text = await asyncio.to_thread(page, address)
    return {
        (s.name, *(v for _, v in sorted(s.labels.items()))): s.value
        for f in text_string_to_metric_families(text)
        for s in f.samples
    }


def test_numbers_by_label() -> None:
    counter = Counter(Spec("milepost_x", Kind.COUNTER, "", labels=("a", "b")))
    cell = counter.cell("p", "q")
    cell.value += 2
    counter.add("p", "q")
    counter.add("r", "s", amount=0.5)
    assert dict(counter.read()) == {("p", "q"): 3, ("r", "s"): 0.5}
    assert counter.value("nobody", "here") == 0

    gauge = Gauge(Spec("milepost_y", Kind.GAUGE, ""))
    assert not list(gauge.read()), "nobody set it: there is no value"
    gauge.set(-1.5)
    assert dict(gauge.read()) == {(): -1.5}

    plain = Counter(Spec("milepost_z", Kind.COUNTER, ""))
    assert dict(plain.read()) == {(): 0}, "a rate needs the zero before the first count"


def test_series_are_bounded() -> None:
    counter = Counter(Spec("milepost_x", Kind.COUNTER, "", labels=("who",)))
    histogram = Histogram(Spec("milepost_h", Kind.HISTOGRAM, "", labels=("who",)))
    for i in range(MAX_SERIES + 5):
        counter.add(f"prompt-{i}")
        histogram.record(1.0, f"prompt-{i}")
    assert len(list(counter.read())) == len(list(histogram.read())) == MAX_SERIES + 1
    assert counter.value(OTHER) == 5


def test_observations_fall_into_their_buckets() -> None:
    histogram = Histogram(Spec("milepost_h", Kind.HISTOGRAM, "", bounds=(1.0, 2.0)))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.record(value)
    assert dict(histogram.read()) == {(): Buckets(counts=(2, 2, 1), total=8.0)}


def test_seconds_go_to_the_phase_that_is_on() -> None:
    now = [100.0]
    phases = Phases(
        Spec("milepost_p", Kind.COUNTER, "", labels=("phase",)), first="idle", clock=lambda: now[0]
    )
    now[0] = 103.0
    assert dict(phases.read()) == {("idle",): 3.0}
    phases.enter("busy")
    now[0] = 104.0
    phases.enter("busy")
    now[0] = 105.5
    assert dict(phases.read()) == {("idle",): 3.0, ("busy",): 2.5}
    phases.enter("idle")
    now[0] = 106.0
    assert (phases.phase, dict(phases.read())) == ("idle", {("idle",): 3.5, ("busy",): 2.5})


def test_what_changes_while_it_is_looked_at_is_looked_at_again() -> None:
    looks = iter([RuntimeError("dictionary changed size during iteration"), None])

    def look() -> list[tuple[tuple[str, ...], float]]:
        if error := next(looks):
            raise error
        return [((), 7.0)]

    assert list(Watched(Spec("milepost_w", Kind.GAUGE, ""), look).read()) == [((), 7.0)]


def test_numbers_are_read_whole_while_others_write() -> None:
    counter = Counter(Spec("milepost_x", Kind.COUNTER, "", labels=("i",)))
    done = threading.Event()

    def write() -> None:
        for i in range(20_000):
            counter.add(str(i % 300))
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    reads = 0
    while not done.is_set() or not reads:
        reads += 1
        assert sum(value for _, value in counter.read()) <= 20_000
    thread.join(10)
    assert sum(value for _, value in counter.read()) == 20_000


INSTRUMENTS = (
    ("perf/step_time", Kind.GAUGE, "s", "perf_step_time"),
    ("train/lr-pg_0", Kind.GAUGE, "1", "train_lr_pg_0"),
    ("sglang:num_running_reqs", Kind.GAUGE, "request", "sglang:num_running_reqs"),
    ("milepost_ledger_payload_bytes", Kind.GAUGE, "By", "milepost_ledger_payload_bytes"),
    ("milepost_waited_seconds", Kind.COUNTER, "s", "milepost_waited_seconds_total"),
    ("milepost_sealed_bytes", Kind.COUNTER, "By", "milepost_sealed_bytes_total"),
)


async def test_prometheus_reads_every_name_as_the_spec_says() -> None:
    instruments: list[Instrument] = []
    for number, (name, kind, unit, _) in enumerate(INSTRUMENTS):
        made = (Counter if kind is Kind.COUNTER else Gauge)(Spec(name, kind, "means", unit=unit))
        made.cell().value = number
        instruments.append(made)
    histogram = Histogram(Spec("milepost_call_seconds", Kind.HISTOGRAM, "", labels=("m",), unit="s"))
    histogram.record(0.02, "x")
    async with serving("router", [*instruments, histogram], listen=FREE, telemetry=OFF) as address:
        got = await scrape(address)
        histogram.record(200.0, "x")
        again = await scrape(address)
    for number, (_, _, _, shown) in enumerate(INSTRUMENTS):
        assert got[shown,] == number
    assert [i.spec.prometheus_name for i in instruments] == [shown for *_, shown in INSTRUMENTS]
    assert got["milepost_call_seconds_bucket", "0.025", "x"] == 1
    assert got["milepost_call_seconds_bucket", "0.01", "x"] == 0
    assert again["milepost_call_seconds_count", "x"] == 2
    assert again["milepost_call_seconds_sum", "x"] == pytest.approx(200.02)
    assert again["process_cpu_seconds_total",] > 0
    assert again["process_resident_memory_bytes",] > 1e6
    assert [key for key in again if key[0] == "milepost_info" and "router" in key]


async def test_what_needs_the_event_loop_is_fetched_at_each_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "REFRESH_S", 60.0)
    calls = 0

    async def refresh() -> list[Instrument]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Unavailable("Redis is away")
        gauge = Gauge(Spec("milepost_fetched", Kind.GAUGE, ""))
        gauge.set(calls)
        return [gauge]

    own = Counter(Spec("milepost_own", Kind.COUNTER, ""))
    async with serving("buffer", [own], listen=FREE, telemetry=OFF, refresh=refresh) as address:
        pages = [await scrape(address) for _ in range(3)]
    assert [p.get(("milepost_fetched",)) for p in pages] == [1, None, 3], "what is not known is left out"
    assert all(("milepost_own_total",) in p for p in pages)


async def test_a_reading_never_waits_long_for_what_it_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "REFRESH_S", 0.1)
    cancelled = asyncio.Event()

    async def refresh() -> list[Instrument]:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return []

    own = Counter(Spec("milepost_own", Kind.COUNTER, ""))
    async with serving("buffer", [own], listen=FREE, telemetry=OFF, refresh=refresh) as address:
        assert ("milepost_own_total",) in await scrape(address)
        await asyncio.wait_for(cancelled.wait(), 30)


async def test_a_port_that_is_taken_and_an_address_that_is_none_are_told() -> None:
    async with serving("a", [], listen=FREE, telemetry=OFF) as address:
        with pytest.raises(Unavailable, match=rf"metrics_listen = {address}: .* choose another one, port 0"):
            async with serving("b", [], listen=address, telemetry=OFF):
                pass
    with pytest.raises(InvalidArgument, match="metrics_listen = '9101': no address"):
        async with serving("b", [], listen="9101", telemetry=OFF):
            pass
    async with serving("b", [], listen=address, telemetry=OFF) as free_again:
        assert free_again == address
    async with serving("b", [], listen="", telemetry=OFF) as nowhere:
        assert nowhere == ""


class Collector(otlp_grpc.MetricsServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.got: list[otlp.ExportMetricsServiceRequest] = []

    def Export(self, request: Any, context: Any) -> Any:
        self.got.append(request)
        return otlp.ExportMetricsServiceResponse()


@contextmanager
def collector() -> Iterator[tuple[Collector, str]]:
    """A collector of OTLP metrics; yields it and its endpoint."""
    server, servicer = grpc.server(ThreadPoolExecutor(2)), Collector()
    otlp_grpc.add_MetricsServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(FREE)
    server.start()
    try:
        yield servicer, f"http://127.0.0.1:{port}"
    finally:
        server.stop(1).wait(10)


async def test_a_collector_is_sent_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_SHUTDOWN_S", 60.0)
    monkeypatch.setattr(export, "_EXPORT_TIMEOUT_S", 60.0)
    histogram = Histogram(Spec("milepost_h_seconds", Kind.HISTOGRAM, "", unit="s", bounds=(1.0,)))
    histogram.record(3.0)
    loss = Gauge(Spec("train/loss", Kind.GAUGE, "the loss", unit="nat"))
    loss.set(0.25)
    with collector() as (servicer, endpoint):
        telemetry = TelemetrySettings(otlp_endpoint=endpoint)
        async with serving("trainer", [loss, histogram], listen="", telemetry=telemetry) as address:
            assert address == ""
        (resource,) = servicer.got[-1].resource_metrics
    attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert attributes["service.name"] == "milepost-trainer"
    sent = {m.name: m for scope in resource.scope_metrics for m in scope.metrics}
    assert sent["train/loss"].gauge.data_points[0].as_double == 0.25
    assert sent["train/loss"].unit == "{nat}"
    (point,) = sent["milepost_h_seconds"].histogram.data_points
    assert (list(point.bucket_counts), point.sum, sent["milepost_h_seconds"].unit) == ([0, 1], 3.0, "s")


async def test_a_collector_that_is_away_delays_nobody() -> None:
    telemetry = TelemetrySettings(otlp_endpoint="http://127.0.0.1:9")
    async with serving("trainer", [], listen=FREE, telemetry=telemetry) as address:
        assert ("milepost_info", "trainer") in {key[:2] for key in await scrape(address)}
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 30


def test_where_metrics_are_pushed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    told = TelemetrySettings(otlp_endpoint="http://told:4317")
    assert otlp_endpoint(OFF) == ""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://both:4317")
    assert otlp_endpoint(OFF) == "http://both:4317"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://metrics:4317")
    assert (otlp_endpoint(OFF), otlp_endpoint(told)) == ("http://metrics:4317", "http://told:4317")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    assert otlp_endpoint(told) == ""


class Echo:
    """A servicer with the ends that a call can have."""

    async def Unary(self, request: bytes, context: Any) -> bytes:
        if request == b"missing":
            raise NotFound("not here")
        if request == b"defect":
            raise ZeroDivisionError
        if request == b"abort":
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, "too far")
        return request

    async def Stream(self, request: bytes, context: Any) -> Any:
        yield request
        if request == b"missing":
            raise NotFound("gone")
        if request == b"forever":
            await asyncio.Event().wait()


def add_echo(servicer: Echo, server: aio.Server) -> None:
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(servicer.Unary),
        "Stream": grpc.unary_stream_rpc_method_handler(servicer.Stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.v1.Echo", handlers),))


async def test_calls_are_counted_by_method_and_how_they_ended() -> None:
    async with GrpcServer(listen=FREE, grace_s=0.1) as server:
        server.add(add_echo, Echo(), "t.v1.Echo")
        await server.start()
        async with aio.insecure_channel(server.address) as channel:
            unary, stream = channel.unary_unary("/t.v1.Echo/Unary"), channel.unary_stream("/t.v1.Echo/Stream")
            for request in (b"hi", b"hi", b"missing", b"defect", b"abort"):
                try:
                    assert await unary(request, timeout=30) == b"hi"
                except aio.AioRpcError:
                    pass
            assert [r async for r in stream(b"hi", timeout=30)] == [b"hi"]
            with pytest.raises(aio.AioRpcError):
                async for _ in stream(b"missing", timeout=30):
                    pass
            endless = stream(b"forever", timeout=30)
            assert await anext(aiter(endless)) == b"forever"
            endless.cancel()
            counts = server.meter.calls
            async with asyncio.timeout(30):
                while not counts.value("Echo/Stream", "CANCELLED"):
                    await unary(b"hi", timeout=30)
    assert counts.value("Echo/Unary", "OK") >= 2
    for code in ("NOT_FOUND", "INTERNAL", "OUT_OF_RANGE"):
        assert counts.value("Echo/Unary", code) == 1, code
    assert (counts.value("Echo/Stream", "OK"), counts.value("Echo/Stream", "NOT_FOUND")) == (1, 1)
    (series,) = list(server.meter.seconds.read())
    assert series[0] == ("Echo/Unary",)
    assert sum(series[1].counts) == sum(v for (m, _), v in counts.read() if m == "Echo/Unary")
    assert math.isfinite(series[1].total)
