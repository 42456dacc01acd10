"""Errors on the wire: MilepostError <-> google.rpc.Status with ErrorInfo and RetryInfo."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc.aio import AioRpcError

from milepost import errors

DETAILS_KEY = "grpc-status-details-bin"
_BROKE_IN_WRITE = "Internal error from Core"
"""What grpc.aio says, in place of the status, of a stream that ended under a message on its way out."""


def to_status_bytes(error: errors.MilepostError) -> bytes:
    """Serializes an error as google.rpc.Status, for the trailing metadata `grpc-status-details-bin`."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=errors.DOMAIN, metadata=error.metadata)
    details = [_pack(info)]
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    code: int = error.code.value[0]
    return status_pb2.Status(code=code, message=error.message, details=details).SerializeToString()


def from_rpc_error(rpc_error: AioRpcError) -> errors.MilepostError:
    """Turns what grpc raised into our tree."""
    message = rpc_error.details() or rpc_error.code().name
    if rpc_error.code() is grpc.StatusCode.INTERNAL and message == _BROKE_IN_WRITE:
        return errors.Unavailable("the stream broke while a message was sent", reason="STREAM_BROKE")
    for key, value in rpc_error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            return _from_details(rpc_error.code(), message, value)
    if rpc_error.code() is grpc.StatusCode.CANCELLED:
        # A server that stops says so, without details, to calls that it has just taken; what we cancel
        # ourselves is asyncio.CancelledError.
        return errors.Unavailable("the service ended the call; is it stopping?")
    return errors.from_status(rpc_error.code(), message)


def _from_details(code: grpc.StatusCode, message: str, raw: bytes) -> errors.MilepostError:
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    retry_after_s: float | None = None
    for detail in status_pb2.Status.FromString(raw).details:
        if detail.TypeName() == "google.rpc.ErrorInfo":
            detail.Unpack(info)
        elif detail.TypeName() == "google.rpc.RetryInfo":
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    metadata = dict(info.metadata)
    return errors.from_status(
        code, message, reason=info.reason, metadata=metadata, retry_after_s=retry_after_s
    )


def _pack(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
