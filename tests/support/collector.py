"""An OpenTelemetry collector that keeps what it is sent: a real gRPC server, in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class Told:
    """A span as it arrived; attributes without their `milepost.`."""

    service: str
    instance: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    failed: bool
    attributes: Mapping[str, Any]
    links: tuple[tuple[str, str], ...]
    """(trace, span) of each."""


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What arrived so far."""

    endpoint: str = ""
    spans: list[Told] = field(default_factory=list[Told])
    lock: threading.Lock = field(default_factory=threading.Lock)
    on_spans: Callable[[], None] | None = None

    def Export(self, request: Any, context: Any) -> Any:
        """Takes spans."""
        arrived = [
            _told(_attributes(of.resource), span)
            for of in request.resource_spans
            for scope in of.scope_spans
            for span in scope.spans
        ]
        with self.lock:
            self.spans.extend(arrived)
        if self.on_spans:
            self.on_spans()
        return trace_service_pb2.ExportTraceServiceResponse()

    def of_trace(self, trace_id: str) -> list[Told]:
        """The spans of one trace, by their start."""
        with self.lock:
            return sorted((s for s in self.spans if s.trace_id == trace_id), key=lambda s: s.start_ns)

    def named(self, name: str) -> list[Told]:
        """The spans of that name, by their start."""
        with self.lock:
            return sorted((s for s in self.spans if s.name == name), key=lambda s: s.start_ns)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens until the block ends."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    collector.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(grace=1.0).wait(5.0)


def _told(resource: Mapping[str, Any], span: Any) -> Told:
    return Told(
        service=resource["service.name"],
        instance=resource["service.instance.id"],
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        failed=span.status.code == 2,
        attributes=_attributes(span),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
    )


def _attributes(of: Any) -> dict[str, Any]:
    return {
        item.key.removeprefix("milepost."): getattr(item.value, item.value.WhichOneof("value"))
        for item in of.attributes
    }
