"""Messages full of payloads, made into bytes with one copy of each payload.

    PutGroupsRequest      pack_put       written by clients
    LeaseStepResponse     pack_lease     written by the buffer
    FetchGroupsResponse   pack_chunks    written by the buffer

Protobuf would copy a payload into the message and from there into the message's bytes, and a batch of sixteen
samples of 36 KiB no longer fits the cache then. Whoever reads finds what protobuf would have written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from milepost import types as t
from milepost.convert import to_proto
from milepost.packing import head
from milepost.v1 import buffer_pb2 as pb
from milepost.v1 import sample_pb2


class Chunk(NamedTuple):
    """A piece of a payload, as `GroupChunk` says."""

    prompt_id: str
    data: bytes | memoryview
    offset_bytes: int
    total_bytes: int


_HEADER, _PAYLOAD = sample_pb2.Group.HEADER_FIELD_NUMBER, sample_pb2.Group.PAYLOAD_FIELD_NUMBER
_GROUPS = pb.PutGroupsRequest.GROUPS_FIELD_NUMBER
_PAYLOADS = pb.LeaseStepResponse.PAYLOADS_FIELD_NUMBER
_CHUNKS = pb.FetchGroupsResponse.CHUNKS_FIELD_NUMBER
_DATA = pb.GroupChunk.DATA_FIELD_NUMBER


def pack_put(run_id: str, groups: Iterable[t.Group]) -> bytes:
    """The bytes of a `PutGroupsRequest`, which are its canonical ones."""
    parts = [pb.PutGroupsRequest(run_id=run_id).SerializeToString()]
    for group in groups:
        header = to_proto(group.header).SerializeToString()
        facts = b"".join((head(_HEADER, len(header)), header, head(_PAYLOAD, len(group.payload))))
        parts += (head(_GROUPS, len(facts) + len(group.payload)), facts, group.payload)
    return b"".join(parts)


def pack_lease(lease: t.StepLease) -> bytes:
    """The bytes of a `LeaseStepResponse`, which are its canonical ones."""
    parts: list[bytes] = [to_proto(replace(lease, payloads=())).SerializeToString()]
    for payload in lease.payloads:
        parts += (head(_PAYLOADS, len(payload)), payload)
    return b"".join(parts)


def pack_chunks(chunks: Iterable[Chunk]) -> bytes:
    """The bytes of a `FetchGroupsResponse`."""
    parts: list[bytes | memoryview] = []
    for chunk in chunks:
        facts = pb.GroupChunk(
            prompt_id=chunk.prompt_id, offset_bytes=chunk.offset_bytes, total_bytes=chunk.total_bytes
        ).SerializeToString()
        facts = b"".join((facts, head(_DATA, len(chunk.data))))
        parts += (head(_CHUNKS, len(facts) + len(chunk.data)), facts, chunk.data)
    return b"".join(parts)
