"""Spans in memory: tracing is on while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from milepost_common.telemetry import tracing
from milepost_common.telemetry.sampling import sampler_of

Finished = Callable[[], Sequence[ReadableSpan]]


@contextmanager
def recording(ratio: float = 1.0) -> Iterator[Finished]:
    """Turns tracing on; yields what tells the spans that have ended."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampler_of(ratio), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.install(provider)
    try:
        yield exporter.get_finished_spans
    finally:
        tracing.install(None)
