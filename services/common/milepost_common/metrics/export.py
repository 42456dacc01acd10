"""Where metrics go: Prometheus's text over HTTP, and OTLP to a collector, both by OpenTelemetry's SDK.

    instruments --read--> bridge --MetricsData--> PrometheusMetricReader        <--GET /metrics-- Prometheus
                                            `--> PeriodicExportingMetricReader  --OTLP----------> collector

The SDK's own instruments cost 5 to 7 us a write, as much as a fifth of what the router may spend on a
request. Ours keep plain numbers, and the bridge hands them to the SDK's readers as finished data, the way the
specification's MetricProducer does.

Reading happens on threads of their own: Prometheus's HTTP server, the periodic exporter. What needs the event
loop (the ledger's counts are in Redis) is fetched there before each reading, with a deadline; what could not
be fetched is left out. Owned by `serving`: it starts both and ends both.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, start_http_server

from milepost import __version__, errors
from milepost.channel import check_address
from milepost_common.metrics.instruments import Buckets, Instrument, Kind, Labels, Reading, Spec
from milepost_common.settings import TelemetrySettings
from milepost_common.telemetry.resource import resource_of

INFO = Spec(
    "milepost_info",
    Kind.GAUGE,
    "1; its labels say which service and version this is",
    labels=("service", "version"),
)

REFRESH_S = 2.0
"""Longest time that what is fetched on the event loop may take at a reading."""
_EXPORT_TIMEOUT_S = 5.0
_SHUTDOWN_S = 1.0
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_SCOPE = InstrumentationScope("milepost")
_CUMULATIVE = sdk.AggregationTemporality.CUMULATIVE

Refresh = Callable[[], Awaitable[Iterable[Instrument]]]
"""Fetches what needs the event loop."""

log = logging.getLogger(__name__)


class Bridge:
    """Turns instruments into the SDK's data.

    Args:
      instruments: read at each collection.
      refresh: gives further ones, fetched on `loop`; None: there are none.
      loop: the service's event loop.
    """

    def __init__(
        self,
        instruments: Sequence[Instrument],
        *,
        refresh: Refresh | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._instruments, self._refresh, self._loop = tuple(instruments), refresh, loop
        self._started_ns = time.time_ns()
        self._closed = threading.Event()

    def close(self) -> None:
        """The event loop is about to end: nothing is fetched on it any more."""
        self._closed.set()

    def extend(self, data: sdk.MetricsData) -> sdk.MetricsData:
        """The SDK's data with ours beside it."""
        metrics = [m for m in map(self._metric, self._all()) if m is not None]
        ours = sdk.ScopeMetrics(scope=_SCOPE, metrics=metrics, schema_url="")
        first, *others = data.resource_metrics
        return replace(
            data, resource_metrics=[replace(first, scope_metrics=[*first.scope_metrics, ours]), *others]
        )

    def _all(self) -> list[Instrument]:
        found = list(self._instruments)
        if self._refresh is None or self._loop is None or self._closed.is_set():
            return found
        future = asyncio.run_coroutine_threadsafe(self._fetch(self._refresh), self._loop)
        try:
            found.extend(future.result(REFRESH_S))
        except (
            concurrent.futures.TimeoutError,
            concurrent.futures.CancelledError,
            errors.MilepostError,
        ) as e:
            future.cancel()
            log.debug("a reading of metrics lacks what is fetched: %s", str(e) or type(e).__name__)
        return found

    @staticmethod
    async def _fetch(refresh: Refresh) -> Iterable[Instrument]:
        return await refresh()

    def _metric(self, instrument: Instrument) -> sdk.Metric | None:
        spec, now = instrument.spec, time.time_ns()
        readings = list(instrument.read())
        if not readings:
            return None
        if spec.kind is Kind.HISTOGRAM:
            points = [self._distribution(spec, r, now) for r in readings]
            data: Any = sdk.Histogram(data_points=points, aggregation_temporality=_CUMULATIVE)
        elif spec.kind is Kind.COUNTER:
            numbers = [self._number(spec, r, now) for r in readings]
            data = sdk.Sum(data_points=numbers, aggregation_temporality=_CUMULATIVE, is_monotonic=True)
        else:
            data = sdk.Gauge(data_points=[self._number(spec, r, now) for r in readings])
        return sdk.Metric(name=spec.name, description=spec.means, unit=spec.exported_unit, data=data)

    def _number(self, spec: Spec, reading: Reading, now_ns: int) -> sdk.NumberDataPoint:
        labels, value = reading
        assert not isinstance(value, Buckets)
        return sdk.NumberDataPoint(
            attributes=_attributes(spec, labels),
            start_time_unix_nano=self._started_ns,
            time_unix_nano=now_ns,
            value=value,
        )

    def _distribution(self, spec: Spec, reading: Reading, now_ns: int) -> sdk.HistogramDataPoint:
        labels, value = reading
        assert isinstance(value, Buckets)
        return sdk.HistogramDataPoint(
            attributes=_attributes(spec, labels),
            start_time_unix_nano=self._started_ns,
            time_unix_nano=now_ns,
            count=sum(value.counts),
            sum=value.total,
            bucket_counts=value.counts,
            explicit_bounds=spec.bounds,
            min=float("nan"),  # not kept
            max=float("nan"),
        )


def _attributes(spec: Spec, labels: Labels) -> dict[str, str]:
    return dict(zip(spec.labels, labels, strict=True))


class _Scraped(PrometheusMetricReader):
    """Prometheus's reader with the bridge's data."""

    def __init__(self, bridge: Bridge, registry: CollectorRegistry) -> None:
        super().__init__(disable_target_info=True, scope_info_enabled=False, registry=registry)
        self._bridge = bridge

    def _receive_metrics(
        self, metrics_data: sdk.MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> None:
        super()._receive_metrics(self._bridge.extend(metrics_data), timeout_millis, **kwargs)


class _Pushed(sdk.PeriodicExportingMetricReader):
    """The periodic exporter with the bridge's data."""

    def __init__(self, bridge: Bridge, exporter: sdk.MetricExporter) -> None:
        self._bridge = bridge  # before the base starts its thread
        super().__init__(exporter, export_timeout_millis=_EXPORT_TIMEOUT_S * 1000)

    def _receive_metrics(
        self, metrics_data: sdk.MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> None:
        super()._receive_metrics(self._bridge.extend(metrics_data), timeout_millis, **kwargs)


@asynccontextmanager
async def serving(
    service: str,
    instruments: Sequence[Instrument],
    *,
    listen: str,
    telemetry: TelemetrySettings,
    refresh: Refresh | None = None,
) -> AsyncGenerator[str]:
    """Exports instruments until the block ends; yields the address of `/metrics`, empty where there is none.

    Args:
      service: its name, for example "router".
      instruments: all of the process.
      listen: `host:port` of `/metrics`; port 0 takes a free one; empty: not served.
      telemetry: names the collector, if there is one.
      refresh: fetches, on the event loop, what is not in this process; run at each reading.

    Raises:
      InvalidArgument: `listen` is no address.
      Unavailable: the address cannot be bound.
    """
    bridge = Bridge(instruments, refresh=refresh, loop=asyncio.get_running_loop())
    registry = CollectorRegistry()
    readers: list[sdk.MetricReader] = [_Scraped(bridge, registry)] if listen else []
    if endpoint := otlp_endpoint(telemetry):
        readers.append(_pushed(bridge, endpoint))
    if not readers:
        yield ""
        return
    provider = _provider(service, readers)
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    stop, address = (lambda: None), ""
    try:
        stop, address = _listen(listen, registry) if listen else (stop, "")
        yield address
    finally:
        bridge.close()
        await asyncio.to_thread(_shut, provider, stop)


def otlp_endpoint(telemetry: TelemetrySettings) -> str:
    """Where metrics are pushed to; empty: nowhere. OTEL_METRICS_EXPORTER=none leaves traces alone."""
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if disabled or os.environ.get("OTEL_METRICS_EXPORTER", "").strip().lower() == "none":
        return ""
    return telemetry.otlp_endpoint or next((os.environ[n] for n in _ENDPOINTS if os.environ.get(n)), "")


def _pushed(bridge: Bridge, endpoint: str) -> sdk.MetricReader:
    # Imported here: it takes a while, and few need it.
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

    return _Pushed(bridge, OTLPMetricExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S))


def _provider(service: str, readers: Sequence[sdk.MetricReader]) -> MeterProvider:
    resource = resource_of(service)
    provider = MeterProvider(metric_readers=readers, resource=resource, shutdown_on_exit=False)

    def info(_: CallbackOptions) -> list[Observation]:
        return [Observation(1, {"service": service, "version": __version__})]

    meter = provider.get_meter("milepost")
    meter.create_observable_gauge(
        INFO.name, callbacks=[info], unit=INFO.exported_unit, description=INFO.means
    )
    return provider


def _listen(listen: str, registry: CollectorRegistry) -> tuple[Callable[[], None], str]:
    check_address("metrics_listen", listen, lowest_port=0)
    host, _, port = listen.rpartition(":")
    try:
        server, thread = start_http_server(int(port), addr=host.strip("[]"), registry=registry)
    except OSError as error:
        raise errors.Unavailable(
            f"metrics_listen = {listen}: {error.strerror or error}; is the port taken? choose another one, "
            'port 0 for a free one, or "" to serve no metrics',
            reason="BIND_FAILED",
        ) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(_SHUTDOWN_S)

    return stop, f"{host}:{server.server_port}"


def _shut(provider: MeterProvider, stop: Callable[[], None]) -> None:
    stop()
    try:
        provider.shutdown(timeout_millis=_SHUTDOWN_S * 1000)
    except Exception as error:  # the SDK gathers what its readers raise into a bare Exception
        log.debug("the exporter of metrics did not end well: %s", error)
