"""The gRPC half of a service: health, reflection, errors, and a stop with a deadline.

    async with GrpcServer(listen="127.0.0.1:0") as server:
        server.add(buffer_pb2_grpc.add_BufferServiceServicer_to_server, servicer, "milepost.v1.BufferService")
        await server.start()
        announce("buffer", grpc=server.address)
        await stop.wait()

Servicers raise `milepost.errors`; the interceptor here turns them into a status with google.rpc.ErrorInfo.
Anything else that they raise is a defect: logged with its stack, and INTERNAL for the caller.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self, cast

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from milepost import errors
from milepost.channel import SERVER_OPTIONS, check_address
from milepost.status import DETAILS_KEY, to_status_bytes
from milepost_common.metrics.calls import OK, CallMeter
from milepost_common.reflection import add_reflection
from milepost_common.telemetry.rpc import inner_interceptors, outer_interceptors

log = logging.getLogger(__name__)

GRACE_S = 5.0
CANCELLED, UNKNOWN = grpc.StatusCode.CANCELLED.name, grpc.StatusCode.UNKNOWN.name


class GrpcServer:
    """One listening gRPC server.

    Args:
      listen: `host:port`; port 0 takes a free one.
      advertise: the address under which others reach it; unset: `listen` with the real port.
      grace_s: how long calls may go on once it stops.

    Attributes:
      meter: what it counts.
    """

    def __init__(self, *, listen: str, advertise: str = "", grace_s: float = GRACE_S) -> None:
        self._listen, self._advertise, self._grace_s = listen, advertise, grace_s
        self.meter = CallMeter()
        errors_and_calls, inner = ErrorInterceptor(self.meter), inner_interceptors()
        guards: list[aio.ServerInterceptor] = [errors_and_calls, *inner] if inner else []
        self._server = aio.server(interceptors=[*outer_interceptors(), *guards], options=SERVER_OPTIONS)
        self._registry: Any = self._server if inner else _Registry(self._server, errors_and_calls)
        self._health = HealthServicer()
        self._names: list[str] = []
        self.port = 0

    @property
    def address(self) -> str:
        """The address to give to others."""
        return self._advertise or f"{self._listen.rpartition(':')[0]}:{self.port}"

    def add(self, add_to_server: Callable[[Any, Any], None], servicer: Any, name: str) -> None:
        """Adds a servicer; `name` is its full service name, for health and reflection."""
        add_to_server(servicer, self._registry)
        self._names.append(name)

    async def start(self) -> None:
        """Binds and serves; the port is known afterwards.

        Raises:
          InvalidArgument: the address is not one.
          Unavailable: the address cannot be bound.
        """
        check_address("listen", self._listen, lowest_port=0)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._registry)
        add_reflection(self._server, names=[*self._names, health.SERVICE_NAME])
        try:
            self.port = self._server.add_insecure_port(self._listen)
        except RuntimeError as error:
            message = f"listen = {self._listen}: cannot bind; is the port taken? choose another one"
            raise errors.Unavailable(message, reason="BIND_FAILED") from error
        await self._server.start()
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """Refuses new calls, gives running ones the grace, then ends them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._grace_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


class _Registry:
    """What services are added to where nothing stands between a handler and its guard.

    Then handlers are guarded where gRPC looks them up: an interceptor costs every call two coroutines.
    """

    def __init__(self, server: aio.Server, guard: ErrorInterceptor) -> None:
        self._server, self._guard = server, guard

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Adds handlers, guarded."""
        self._server.add_generic_rpc_handlers([_Guarded(h, self._guard) for h in handlers])

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None:
        """Generated code says the same twice; asyncio's server has no use for the second."""


class _Guarded(grpc.GenericRpcHandler):
    def __init__(self, inner: grpc.GenericRpcHandler, guard: ErrorInterceptor) -> None:
        self._inner, self._guard = inner, guard

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = self._inner.service(handler_call_details)
        return handler and self._guard.guarded(handler, str(handler_call_details.method))


class ErrorInterceptor(aio.ServerInterceptor):
    """Turns what servicers raise into a gRPC status with details, and counts how calls end."""

    def __init__(self, meter: CallMeter) -> None:
        self._meter = meter
        self._made: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler by its kind."""
        handler: Any = await continuation(handler_call_details)
        return handler and self.guarded(handler, str(handler_call_details.method))

    def guarded(self, handler: Any, method: str) -> Any:
        """The handler with the guard around it, made once."""
        known = self._made.get(method)
        if known is None or known[0] is not handler:  # another one for each call that is traced
            known = self._made[method] = handler, self._wrapped(handler, method)
        return known[1]

    def _wrapped(self, handler: Any, method: str) -> Any:
        codec: dict[str, Any] = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if not handler.response_streaming:
            inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
            make: Any = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            return make(_guard_unary(inner, method, self._meter), **codec)
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return make(_guard_stream(inner, method, self._meter), **codec)


def _guard_unary(inner: Any, method: str, meter: CallMeter) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        started, code = time.perf_counter(), OK
        try:
            return await inner(request, context)
        except asyncio.CancelledError:
            code = CANCELLED
            raise
        except aio.AbortError:
            code = _code_of(context)
            raise
        except Exception as error:
            code = _name_of(error)
            await _abort(context, error, method)
        finally:
            meter.answered(method, code, started=started)

    return guarded


def _guard_stream(inner: Any, method: str, meter: CallMeter) -> Any:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        code = OK
        try:
            async for reply in inner(request, context):
                yield reply
        except (asyncio.CancelledError, GeneratorExit):
            code = CANCELLED
            raise
        except aio.AbortError:
            code = _code_of(context)
            raise
        except Exception as error:
            code = _name_of(error)
            await _abort(context, error, method)
        finally:
            meter.ended(method, code)

    return guarded


def _code_of(context: Any) -> str:
    """The status that a servicer aborted with."""
    code = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else UNKNOWN


def _name_of(error: Exception) -> str:
    return (error.code if isinstance(error, errors.MilepostError) else grpc.StatusCode.INTERNAL).name


async def _abort(context: Any, error: Exception, method: str) -> NoReturn:
    if not isinstance(error, errors.MilepostError):
        log.exception("%s failed", method, exc_info=error)
        error = errors.Internal(f"{method}: {type(error).__name__}: {error}; please report this")
    trailing = (*cast(Any, context.trailing_metadata() or ()), (DETAILS_KEY, to_status_bytes(error)))
    await context.abort(error.code, error.message, trailing)
    raise AssertionError("abort returned")
