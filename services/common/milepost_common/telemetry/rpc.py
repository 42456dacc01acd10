"""What the gRPC server adds to calls for traces and logs. Both are left out where they would do nothing.

Server spans are made for callers whose trace is recorded; calls of all others pass untouched. No call begins
a trace here: what services ask of one another all day long (leases, heartbeats, watches) makes no spans. The
span of a unary call is active in its handler; that of a stream is not, for a stream's handler may be closed
from elsewhere.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc import aio

from milepost.tracing import TRACEPARENT
from milepost_common.telemetry import logs, tracing

Details = grpc.HandlerCallDetails
Continuation = Callable[[Details], Awaitable[Any]]


def outer_interceptors() -> list[aio.ServerInterceptor]:
    """Those that also see what becomes of errors."""
    return [AboutInterceptor()] if logs.as_json else []


def inner_interceptors() -> list[aio.ServerInterceptor]:
    """Those that see errors as they were raised."""
    return [TraceInterceptor()] if tracing.on else []


class TraceInterceptor(aio.ServerInterceptor):
    """Makes spans of calls."""

    async def intercept_service(self, continuation: Continuation, handler_call_details: Details) -> Any:
        """Wraps the handler where the caller's trace is recorded."""
        handler: Any = await continuation(handler_call_details)
        parent = _traceparent(handler_call_details)
        if handler is None or not tracing.sampled(parent):
            return handler
        name = str(handler_call_details.method).lstrip("/")
        wrap = _traced_stream if handler.response_streaming else _traced_unary
        return _wrapped(handler, lambda inner: wrap(inner, name, parent))


class AboutInterceptor(aio.ServerInterceptor):
    """Binds the run of a unary request for the lines that are logged while it is served."""

    async def intercept_service(self, continuation: Continuation, handler_call_details: Details) -> Any:
        """Wraps the handler."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.response_streaming:
            return handler
        return _wrapped(handler, _about)


def _wrapped(handler: Any, wrap: Callable[[Any], Any]) -> Any:
    """The handler with its behaviour wrapped."""
    kind = f"{_kind(handler.request_streaming)}_{_kind(handler.response_streaming)}"
    make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        wrap(getattr(handler, kind)),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _kind(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _traceparent(details: Details) -> str:
    found = (value for key, value in details.invocation_metadata or () if key == TRACEPARENT)
    value = next(found, "")
    return value if isinstance(value, str) else ""


def _about(inner: Any) -> Any:
    async def bound(request: Any, context: Any) -> Any:
        with logs.about(run=getattr(request, "run_id", "")):
            return await inner(request, context)

    return bound


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
