"""Messages full of payloads, made into bytes with one copy of each payload.

    PutGroupsRequest      pack_put       written by clients
    FetchGroupsResponse   pack_chunks    written by the buffer

Protobuf would copy a payload into the message and from there into the message's bytes, and a batch of sixteen
samples of 36 KiB no longer fits the cache then. Whoever reads finds what protobuf would have written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from milepost import types as t
from milepost.convert import to_proto
from milepost.v1 import buffer_pb2 as pb
from milepost.v1 import sample_pb2

_LENGTH_FOLLOWS = 2


class Chunk(NamedTuple):
    """A piece of a payload, as `GroupChunk` says."""

    prompt_id: str
    data: bytes | memoryview
    offset_bytes: int
    total_bytes: int


def _tag(number: int) -> bytes:
    return _varint(number << 3 | _LENGTH_FOLLOWS)


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


_HEADER, _PAYLOAD = _tag(sample_pb2.Group.HEADER_FIELD_NUMBER), _tag(sample_pb2.Group.PAYLOAD_FIELD_NUMBER)
_GROUPS = _tag(pb.PutGroupsRequest.GROUPS_FIELD_NUMBER)
_CHUNKS = _tag(pb.FetchGroupsResponse.CHUNKS_FIELD_NUMBER)
_DATA = _tag(pb.GroupChunk.DATA_FIELD_NUMBER)


def pack_put(run_id: str, groups: Iterable[t.Group]) -> bytes:
    """The bytes of a `PutGroupsRequest`, which are its canonical ones."""
    parts = [pb.PutGroupsRequest(run_id=run_id).SerializeToString()]
    for group in groups:
        header = to_proto(group.header).SerializeToString()
        facts = b"".join((_HEADER, _varint(len(header)), header, _PAYLOAD, _varint(len(group.payload))))
        parts += (_GROUPS, _varint(len(facts) + len(group.payload)), facts, group.payload)
    return b"".join(parts)


def pack_chunks(chunks: Iterable[Chunk]) -> bytes:
    """The bytes of a `FetchGroupsResponse`."""
    parts: list[bytes | memoryview] = []
    for chunk in chunks:
        facts = pb.GroupChunk(
            prompt_id=chunk.prompt_id, offset_bytes=chunk.offset_bytes, total_bytes=chunk.total_bytes
        ).SerializeToString()
        facts = b"".join((facts, _DATA, _varint(len(chunk.data))))
        parts += (_CHUNKS, _varint(len(facts) + len(chunk.data)), facts, chunk.data)
    return b"".join(parts)
