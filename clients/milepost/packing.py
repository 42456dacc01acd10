"""Messages with large arrays as bytes, put together from pieces, each copied once.

    Sample        = facts (all other fields, as protobuf writes them) + head + array, three times
    GroupPayload  = the prompt (likewise) + head + Sample, for each sample

protobuf copies an array into the message, and again, more than once, as its output grows. Any parser reads
what is made here: the fields are those of the message, the arrays at its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from milepost.types import Sample
from milepost.v1 import sample_pb2

INT32, UINT8, FLOAT32 = np.dtype("<i4"), np.dtype("|u1"), np.dtype("<f4")

Piece = Any
"""Bytes, or an array: numpy does not declare that its arrays are buffers."""


def pack_payload(prompt: bytes, samples: Iterable[tuple[bytes, Sample]]) -> bytes:
    """A `GroupPayload`.

    Args:
      prompt: a message that has the prompt and no samples.
      samples: of each a message without arrays, and where they are.
    """
    pieces: list[Piece] = [prompt]
    for facts, sample in samples:
        body, size = _pieces_of(facts, sample)
        pieces += (head(sample_pb2.GroupPayload.SAMPLES_FIELD_NUMBER, size), *body)
    return b"".join(pieces)


def pack_sample(facts: bytes, sample: Sample) -> bytes:
    """A `Sample`."""
    return b"".join(_pieces_of(facts, sample)[0])


def _pieces_of(facts: bytes, sample: Sample) -> tuple[list[Piece], int]:
    """The pieces, and how many bytes they are."""
    tokens = np.ascontiguousarray(sample.tokens, INT32)
    mask = np.ascontiguousarray(sample.loss_mask, UINT8)
    logprobs = np.ascontiguousarray(sample.logprobs, FLOAT32)
    before_tokens, before_mask, before_logprobs, size = _array_heads(tokens.size, mask.size, logprobs.size)
    pieces = [facts, before_tokens, tokens, before_mask, mask, before_logprobs, logprobs]
    return pieces, len(facts) + size


@lru_cache(maxsize=1024)
def _array_heads(num_tokens: int, num_masked: int, num_logprobs: int) -> tuple[bytes, bytes, bytes, int]:
    """What stands before each array of a sample, and the bytes of all this and of the arrays."""
    sizes = {
        sample_pb2.Sample.TOKENS_FIELD_NUMBER: num_tokens * INT32.itemsize,
        sample_pb2.Sample.LOSS_MASK_FIELD_NUMBER: num_masked * UINT8.itemsize,
        sample_pb2.Sample.LOGPROBS_FIELD_NUMBER: num_logprobs * FLOAT32.itemsize,
    }
    tokens, mask, logprobs = (head(number, size) for number, size in sizes.items())
    return tokens, mask, logprobs, len(tokens) + len(mask) + len(logprobs) + sum(sizes.values())


def head(number: int, size: int) -> bytes:
    """What stands before a field of bytes, or of a message: its number, that a length follows, the length."""
    return _varint(number << 3 | 2) + _varint(size)


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)
