"""A client that knows nothing but server reflection, as grpcurl does, with each of the four services.

It imports no contract of Milepost: services, messages and even the details of errors come from descriptors
that the servers send, in a descriptor pool of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha import reflection_pb2

from stack import READY_S, Stack, until

CALL_S = 60.0
V1, V1ALPHA = "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"
SERVED = {
    "buffer": {"milepost.v1.BufferService", "milepost.v1.WeightService"},
    "router": {"milepost.v1.RouterService"},
    "rollout": {"milepost.v1.RolloutService"},
    "trainer": {"milepost.v1.TrainerService"},
}
CALLS = {
    "buffer": ("milepost.v1.BufferService/GetStats", {}),
    "router": ("milepost.v1.RouterService/ListEngines", {}),
    "rollout": ("milepost.v1.RolloutService/GetStatus", {}),
    "trainer": ("milepost.v1.TrainerService/GetTrainerStatus", {}),
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Stranger:
    """Calls a server through what it tells of itself."""

    def __init__(self, channel: grpc.aio.Channel, reflection: str) -> None:
        self._channel = channel
        self._ask = channel.stream_stream(
            f"/{reflection}/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        self._pool = descriptor_pool.DescriptorPool()
        self._known: set[str] = set()

    async def _answer(self, **what: str) -> reflection_pb2.ServerReflectionResponse:
        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            yield reflection_pb2.ServerReflectionRequest(**what)

        (answer,) = [a async for a in self._ask(requests(), timeout=CALL_S)]
        assert not answer.HasField("error_response"), (what, answer.error_response)
        return answer

    async def services(self) -> set[str]:
        """Full names of the services."""
        answer = await self._answer(list_services="*")
        return {service.name for service in answer.list_services_response.service}

    async def learn(self, symbol: str) -> None:
        """Takes in the file that a symbol is defined in, and all that it imports."""
        answer = await self._answer(file_containing_symbol=symbol)
        raw = answer.file_descriptor_response.file_descriptor_proto
        files = {f.name: f for f in map(descriptor_pb2.FileDescriptorProto.FromString, raw)}
        for name in files:
            await self._add(name, files)

    async def _add(self, name: str, files: dict[str, descriptor_pb2.FileDescriptorProto]) -> None:
        if name in self._known:
            return
        if name not in files:
            answer = await self._answer(file_by_filename=name)
            for raw in answer.file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(raw)
                files[file.name] = file
        for dependency in files[name].dependency:
            await self._add(dependency, files)
        self._pool.Add(files[name])
        self._known.add(name)

    def message(self, name: str) -> Any:
        """The class of a message, made from its descriptor."""
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(name))

    async def call(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Calls a unary method with a request in JSON; answers in JSON."""
        service, _, name = path.partition("/")
        await self.learn(service)
        method = self._pool.FindServiceByName(service).FindMethodByName(name)
        request = json_format.ParseDict(fields, self.message(method.input_type.full_name)())
        reply = await self._channel.unary_unary(
            f"/{path}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=self.message(method.output_type.full_name).FromString,
        )(request, timeout=CALL_S)
        return json_format.MessageToDict(
            reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )

    async def details(self, error: grpc.aio.AioRpcError) -> dict[str, dict[str, Any]]:
        """The details of an error by the names of their messages, decoded from descriptors."""
        (raw,) = [v for k, v in error.trailing_metadata() or () if k == "grpc-status-details-bin"]
        await self.learn("google.rpc.Status")
        await self.learn("google.rpc.ErrorInfo")
        status = self.message("google.rpc.Status").FromString(raw)
        assert (status.code, status.message) == (error.code().value[0], error.details())
        found: dict[str, dict[str, Any]] = {}
        for detail in status.details:
            name = detail.type_url.rpartition("/")[2]
            found[name] = json_format.MessageToDict(self.message(name).FromString(detail.value))
        return found


@asynccontextmanager
async def stranger(stack: Stack, name: str, reflection: str = V1ALPHA) -> AsyncIterator[Stranger]:
    await stack.ready(name)
    async with grpc.aio.insecure_channel(stack.address(name)) as channel:
        yield Stranger(channel, reflection)


@pytest.mark.parametrize("reflection", [V1, V1ALPHA])
@pytest.mark.parametrize("name", SERVED)
async def test_services_are_listed_described_and_called(stack: Stack, name: str, reflection: str) -> None:
    await stack.ready("trainer")
    async with stranger(stack, name, reflection) as client:
        listed = await client.services()
        assert listed == SERVED[name] | {"grpc.health.v1.Health", V1ALPHA}
        for service in listed:
            await client.learn(service)
        health = await client.call("grpc.health.v1.Health/Check", {"service": min(SERVED[name])})
        assert health == {"status": "SERVING"}

        async def answered() -> dict[str, Any] | None:
            answer = await client.call(*CALLS[name])
            return answer if len(answer.get("engines", "ab")) == 2 else None

        answer = await until("an answer, with both engines", answered, within_s=READY_S)
    match name:
        case "buffer":
            runs = {r["run_id"]: r for r in answer["runs"]}
            assert runs[stack.run_id]["max_payload_bytes"] == str(8 * 2**30)
        case "router":
            assert {e["engine_id"] for e in answer["engines"]} == {"engine-0", "engine-1"}
        case "rollout":
            assert answer["run_id"] == stack.run_id
            assert answer["instance_id"]
        case _:
            assert answer["run_id"] == stack.run_id


async def test_an_error_is_decoded_from_descriptors(stack: Stack) -> None:
    async with stranger(stack, "buffer") as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.call("milepost.v1.BufferService/GetRun", {"run_id": "nosuch"})
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        details = await client.details(caught.value)
    assert details == {
        "google.rpc.ErrorInfo": {
            "reason": "UNKNOWN_RUN",
            "domain": "milepost.dev",
            "metadata": {"run_id": "nosuch"},
        }
    }


async def test_a_refusal_with_retry_info_is_decoded_from_descriptors(stack: Stack) -> None:
    async with stranger(stack, "buffer") as client:
        run_id = "no-credits"
        config = {"groups_per_step": 1, "max_staleness": 0}
        await client.call("milepost.v1.BufferService/CreateRun", {"run_id": run_id, "config": config})
        items = [{"prompt": {"prompt_id": f"p{i}", "text": "1+1="}} for i in range(3)]
        put = "milepost.v1.BufferService/PutPrompts"
        first = await client.call(put, {"run_id": run_id, "items": items})
        assert (first["accepted"], first["credits"]) == (2, "0")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.call(put, {"run_id": run_id, "items": items[2:]})
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = await client.details(caught.value)
    assert details["google.rpc.ErrorInfo"]["reason"] == "NO_CREDITS"
    assert details["google.rpc.RetryInfo"] == {"retryDelay": "1s"}
