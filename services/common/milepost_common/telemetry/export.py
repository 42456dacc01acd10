"""Sends spans to an OpenTelemetry collector, where one is known, and never waits for it.

    spans --> queue (bounded) --> one thread --OTLP over gRPC--> collector

A service goes on as if nothing had happened when the collector is slow, dead or was never there: the queue
drops what does not fit, and at the end `FLUSH_S` is all the time that what is left gets. The exporter's
complaints are logged once a minute.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from milepost_common.telemetry import tracing

if TYPE_CHECKING:
    from milepost_common.settings import TelemetrySettings

FLUSH_S = 2.0
EXPORT_TIMEOUT_S = 5.0
_EVERY_S = 1.0
_QUEUE, _BATCH = 16_384, 512
_MAX_LINKS = 4096
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

log = logging.getLogger(__name__)


def endpoint_of(settings: TelemetrySettings) -> str:
    """Where the collector is; empty: nothing is exported."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ""
    return settings.otlp_endpoint or next((os.environ[n] for n in _ENDPOINTS if os.environ.get(n)), "")


@contextmanager
def exporting(name: str, settings: TelemetrySettings) -> Generator[None]:
    """Makes and sends spans while the block runs, if there is a collector to send them to."""
    endpoint = endpoint_of(settings)
    if not endpoint:
        yield
        return
    exporter = _exporter(endpoint)
    provider = make_provider(name, settings, exporter=exporter)
    tracing.install(provider)
    try:
        yield
    finally:
        tracing.install(None)
        if not within(FLUSH_S, provider.force_flush):
            log.warning("%s did not take the last spans within %g s: they are lost", endpoint, FLUSH_S)
            exporter_log().setLevel(logging.CRITICAL)  # what is cut off now would complain
        exporter.shutdown()


def exporting_from_environment(name: str) -> AbstractContextManager[None]:
    """`exporting` with the settings of the environment, for commands that are no service."""
    from milepost_common.settings import load_telemetry

    return exporting(name, load_telemetry())


def make_provider(name: str, settings: TelemetrySettings, *, exporter: Any) -> Any:
    """A tracer provider of a service that hands spans to `exporter` from a thread of its own."""
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from milepost_common.telemetry.resource import resource_of
    from milepost_common.telemetry.sampling import sampler_of

    provider = TracerProvider(
        sampler=sampler_of(settings.trace_ratio),
        resource=resource_of(name),
        shutdown_on_exit=False,  # that would wait for a collector that is not there
        span_limits=SpanLimits(max_links=_MAX_LINKS),
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=_QUEUE,
            max_export_batch_size=_BATCH,
            schedule_delay_millis=_EVERY_S * 1000,
        )
    )
    return provider


def exporter_log() -> logging.Logger:
    """Where the OTLP exporters complain."""
    return logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter")


def _exporter(endpoint: str) -> Any:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    exporter_log().addFilter(OncePer(60.0))
    return OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)


def within(timeout_s: float, work: Callable[[], Any]) -> bool:
    """Runs `work` in a thread and waits for it for that long; False: it is still at it, and nobody minds."""
    thread = threading.Thread(target=work, name="telemetry end", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return not thread.is_alive()


class OncePer(logging.Filter):
    """Lets the first line of each level through, and then one in `period_s`."""

    def __init__(self, period_s: float) -> None:
        super().__init__()
        self._period_s = period_s
        self._next: dict[int, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is logged."""
        now = time.monotonic()
        if now < self._next.get(record.levelno, 0.0):
            return False
        self._next[record.levelno] = now + self._period_s
        return True
