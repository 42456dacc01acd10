"""What grpc raises, in our tree of errors."""

from __future__ import annotations

import grpc
from grpc.aio import AioRpcError, Metadata

from milepost import errors
from milepost.status import from_rpc_error


def test_a_stream_that_ends_under_a_message_may_be_asked_again() -> None:
    """grpc.aio forgets the status then, and tells of an internal error."""
    broke = AioRpcError(grpc.StatusCode.INTERNAL, Metadata(), Metadata(), details="Internal error from Core")
    assert isinstance(from_rpc_error(broke), errors.Unavailable)


def test_an_internal_error_of_the_service_stays_one() -> None:
    told = AioRpcError(grpc.StatusCode.INTERNAL, Metadata(), Metadata(), details="KeyError: 'x'")
    assert isinstance(from_rpc_error(told), errors.Internal)
