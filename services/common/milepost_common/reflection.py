"""Server reflection under both of its names, so that grpcurl and its like need no protos.

Version v1 has the messages of v1alpha, field for field; grpcio-reflection offers v1alpha alone, new tools ask
for v1 first. Neither is listed under v1's name, for which there is no descriptor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

V1 = "grpc.reflection.v1.ServerReflection"


def add_reflection(server: Any, *, names: Sequence[str]) -> None:
    """Adds the reflection of these services, given by their full names, to a server."""
    listed = [*names, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(listed, server)
    info = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(listed).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(V1, {"ServerReflectionInfo": info}),)
    )
