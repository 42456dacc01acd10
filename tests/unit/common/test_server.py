"""Errors, health and reflection of the shared server, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from loop_clock import skip
from milepost import BufferClient, errors
from milepost.channel import NO_RETRY, RetryPolicy
from milepost.v1 import buffer_pb2, buffer_pb2_grpc
from milepost_common.server import GrpcServer


class Servicer(buffer_pb2_grpc.BufferServiceServicer):
    """Raises what it is told."""

    def __init__(self) -> None:
        self.raises: list[Exception] = []

    async def GetRun(self, request: Any, context: Any) -> Any:
        if self.raises:
            raise self.raises.pop(0)
        context.set_trailing_metadata((("x-milepost-redis-run-id", "abc"),))
        return buffer_pb2.GetRunResponse()

    async def FetchGroups(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield buffer_pb2.FetchGroupsResponse()
        await asyncio.Event().wait()

    async def GetLedger(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield buffer_pb2.GetLedgerResponse()
        raise self.raises.pop(0)


@asynccontextmanager
async def serving(servicer: Servicer) -> AsyncIterator[GrpcServer]:
    async with GrpcServer(listen="127.0.0.1:0", grace_s=0.1) as server:
        server.add(buffer_pb2_grpc.add_BufferServiceServicer_to_server, servicer, "milepost.v1.BufferService")
        await server.start()
        yield server


@pytest.mark.parametrize("kind", [*errors.BY_CODE.values(), *errors.BY_REASON.values()])
async def test_every_error_comes_back_as_itself(kind: type[errors.MilepostError]) -> None:
    servicer = Servicer()
    servicer.raises = [kind("field x = 3: too small; use 4", metadata={"x": "3"}, retry_after_s=0.25)]
    async with (
        serving(servicer) as server,
        BufferClient(server.address, retry=NO_RETRY) as client,
    ):
        with pytest.raises(kind) as caught:
            await client.get_run("r")
    assert type(caught.value) is kind
    assert "field x = 3: too small; use 4" in str(caught.value)
    assert caught.value.metadata == {"x": "3"}
    assert caught.value.retry_after_s == 0.25
    assert caught.value.reason == kind.default_reason


async def test_a_defect_is_internal_and_named() -> None:
    servicer = Servicer()
    servicer.raises = [RuntimeError("boom")]
    async with serving(servicer) as server, BufferClient(server.address) as client:
        with pytest.raises(errors.Internal, match="RuntimeError: boom"):
            await client.get_run("r")


async def test_a_stream_that_fails_keeps_what_it_sent() -> None:
    servicer = Servicer()
    servicer.raises = [errors.NotFound("run r is not known; create it")]
    async with serving(servicer) as server, BufferClient(server.address) as client:
        with pytest.raises(errors.NotFound, match="create it"):
            async for _ in client.get_ledger("r"):
                pass


async def test_a_stream_that_falls_silent_is_given_up() -> None:
    async with serving(Servicer()) as server, BufferClient(server.address, timeout_s=200.0) as client:
        stub = buffer_pb2_grpc.BufferServiceStub(client._channel)
        stream = client._stream(stub.FetchGroups, buffer_pb2.FetchGroupsRequest(), quiet_s=100.0)
        assert await anext(stream) == buffer_pb2.FetchGroupsResponse()
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        skip(299.0)
        await asyncio.sleep(0)
        assert not waiting.done()
        skip(1.0)
        with pytest.raises(errors.DeadlineExceeded, match=r"nothing came for 300 s"):
            await asyncio.wait_for(waiting, 30)


async def test_payloads_that_stop_coming_are_given_up_long_before_the_whole_deadline() -> None:
    async with serving(Servicer()) as server, BufferClient(server.address, timeout_s=0.2) as client:
        groups = client.fetch_groups("r", prompt_ids=["p"], timeout_s=3600.0)
        with pytest.raises(errors.DeadlineExceeded, match=r"nothing came for 0\.2 s"):
            await asyncio.wait_for(anext(groups), 30)


async def test_unavailable_is_retried_and_the_redis_identity_is_kept() -> None:
    servicer = Servicer()
    servicer.raises = [errors.Unavailable("redis is away"), errors.Unavailable("redis is away")]
    policy = RetryPolicy(retry_for_s=20.0, first_delay_s=0.001)
    async with serving(servicer) as server, BufferClient(server.address, retry=policy) as client:
        await client.get_run("r")
        assert client.redis_run_id == "abc"
    assert servicer.raises == []


async def test_nobody_there_names_the_address() -> None:
    async with BufferClient("127.0.0.1:1", retry=NO_RETRY) as client:
        with pytest.raises(errors.Unavailable, match=r"127\.0\.0\.1:1"):
            await client.get_run("r")


async def test_a_taken_port_says_so() -> None:
    async with serving(Servicer()) as server:
        second = GrpcServer(listen=f"127.0.0.1:{server.port}")
        with pytest.raises(errors.Unavailable, match="cannot bind"):
            await second.start()


async def test_health_and_reflection_answer() -> None:
    async with serving(Servicer()) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(
            health_pb2.HealthCheckRequest(service="milepost.v1.BufferService"), timeout=30
        )
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=30
        )
        names = [s.name async for m in listing for s in m.list_services_response.service]
    assert "milepost.v1.BufferService" in names
