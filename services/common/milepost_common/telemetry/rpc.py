"""Server spans of gRPC calls, for callers whose trace is recorded; calls of all others pass untouched.

No call begins a trace here: what services ask of one another all day long (leases, heartbeats, watches) makes
no spans. The span of a unary call is active in its handler; that of a stream is not, for a stream's handler
may be closed from elsewhere.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc import aio

from milepost.tracing import TRACEPARENT
from milepost_common.telemetry import tracing


class TraceInterceptor(aio.ServerInterceptor):
    """Goes inside the interceptor that turns errors into statuses, so that it sees the errors."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler where the caller's trace is recorded."""
        handler: Any = await continuation(handler_call_details)
        parent = _traceparent(handler_call_details)
        if handler is None or not tracing.sampled(parent):
            return handler
        name = str(handler_call_details.method).lstrip("/")
        kind = f"{_kind(handler.request_streaming)}_{_kind(handler.response_streaming)}"
        wrap = _traced_stream if handler.response_streaming else _traced_unary
        make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            wrap(getattr(handler, kind), name, parent),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _kind(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _traceparent(details: grpc.HandlerCallDetails) -> str:
    found = (value for key, value in details.invocation_metadata or () if key == TRACEPARENT)
    value = next(found, "")
    return value if isinstance(value, str) else ""


def _traced_unary(inner: Any, name: str, parent: str) -> Any:
    async def traced(request: Any, context: Any) -> Any:
        with tracing.span(name, parent=parent, kind="server"):
            return await inner(request, context)

    return traced


def _traced_stream(inner: Any, name: str, parent: str) -> Any:
    async def traced(request: Any, context: Any) -> AsyncIterator[Any]:
        span = tracing.span(name, parent=parent, kind="server")
        try:
            async for reply in inner(request, context):
                yield reply
        except Exception as error:
            span.fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            span.end()

    return traced
