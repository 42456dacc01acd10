"""Server spans over a real socket: for callers that are traced, and for nobody else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry import trace

from milepost import BufferClient, errors
from milepost import tracing as client
from milepost.v1 import buffer_pb2, buffer_pb2_grpc
from milepost_common.server import GrpcServer
from milepost_common.telemetry import tracing


class Servicer(buffer_pb2_grpc.BufferServiceServicer):
    """Remembers what was active in its handlers."""

    def __init__(self) -> None:
        self.active: list[str] = []

    async def GetRun(self, request: Any, context: Any) -> Any:
        self.active.append(client.active())
        if request.run_id == "none":
            raise errors.NotFound("run 'none' is not known; create it")
        return buffer_pb2.GetRunResponse()

    async def GetLedger(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.active.append(client.active())
        yield buffer_pb2.GetLedgerResponse()


@asynccontextmanager
async def serving(servicer: Servicer) -> AsyncIterator[BufferClient]:
    async with GrpcServer(listen="127.0.0.1:0", grace_s=0.1) as server:
        server.add(buffer_pb2_grpc.add_BufferServiceServicer_to_server, servicer, "milepost.v1.BufferService")
        await server.start()
        async with BufferClient(server.address) as buffer:
            yield buffer


async def test_a_traced_call_has_a_server_span_that_is_active_in_the_handler(finished: Any) -> None:
    servicer = Servicer()
    async with serving(servicer) as buffer:
        with tracing.span("caller", begins=True):
            await buffer.get_run("r")
    served, caller = finished()
    assert (served.name, served.kind) == ("milepost.v1.BufferService/GetRun", trace.SpanKind.SERVER)
    assert (served.parent.span_id, served.parent.is_remote) == (caller.context.span_id, True)
    assert servicer.active == [client.traceparent_of(served.context)]


async def test_calls_without_a_trace_and_streams_make_no_spans(finished: Any) -> None:
    servicer = Servicer()
    async with serving(servicer) as buffer:
        await buffer.get_run("r")
        with tracing.span("caller", begins=True):
            assert [row async for row in buffer.get_ledger("r")] == []
    assert [s.name for s in finished()] == ["caller"]
    assert servicer.active == ["", ""]


async def test_the_span_of_a_refused_call_says_why(finished: Any) -> None:
    async with serving(Servicer()) as buffer:
        with pytest.raises(errors.NotFound), tracing.span("caller", begins=True):
            await buffer.get_run("none")
    served = finished()[0]
    assert served.status.status_code is trace.StatusCode.ERROR
    assert "create it" in served.status.description


async def test_a_caller_that_is_not_recorded_makes_no_span_here(start_tracing: Any) -> None:
    finished = start_tracing(0.0)
    servicer = Servicer()
    async with serving(servicer) as buffer:
        await buffer.get_run("r")
    assert not finished()
