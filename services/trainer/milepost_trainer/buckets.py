"""Buckets: how named tensors are laid out for publication. A pure plan, made once per model.

Layout of a bucket, the ``flattened_bucket`` of engines: tensors back to back in order, each in its dtype,
contiguous, little-endian, without padding. Names are Hugging Face names; a tied weight stands once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSlot:
    """One tensor of a bucket.

    Attributes:
        name: Hugging Face name.
        dtype: as torch names it, for example "bfloat16".
        shape: its whole shape.
        offset_bytes: where it starts in the bucket.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together.

    Attributes:
        index: from 0, in sending order.
        slots: its tensors, back to back.
    """

    index: int
    slots: tuple[TensorSlot, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole bucket."""
        return sum(slot.size_bytes for slot in self.slots)


def dtype_name(dtype: torch.dtype) -> str:
    """The wire name of a dtype.

    Raises:
        ValueError: weights of that dtype are not published.
    """
    if dtype not in _NAMES:
        raise ValueError(f"dtype is {dtype}: weights are published as one of {', '.join(DTYPES)}")
    return _NAMES[dtype]


def plan_buckets(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], *, bucket_bytes: int
) -> tuple[Bucket, ...]:
    """Cut named tensors, in order, into buckets.

    Args:
        tensors: (name, dtype, shape) of each tensor.
        bucket_bytes: most bytes of a bucket; a larger tensor gets one of its own.

    Returns:
        The buckets; every tensor stands in exactly one.

    Raises:
        ValueError: the budget is below 1, or a name stands twice.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}: it must be at least 1")
    names = [name for name, _, _ in tensors]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"tensor names stand twice: {', '.join(twice)}; send a tied weight once")
    buckets: list[list[TensorSlot]] = []
    filled = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        if not buckets or filled + size > bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(TensorSlot(name, dtype, shape, filled))
        filled += size
    return tuple(Bucket(index, tuple(slots)) for index, slots in enumerate(buckets))


def read_bucket(bucket: Bucket, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name the tensors that lie in a flat bucket (views where alignment allows, else copies).

    Args:
        bucket: its plan.
        flat: uint8 [size_bytes].

    Returns:
        name -> tensor.
    """
    named: dict[str, torch.Tensor] = {}
    for slot in bucket.slots:
        dtype = DTYPES[slot.dtype]
        raw = flat[slot.offset_bytes : slot.offset_bytes + slot.size_bytes]
        if (flat.storage_offset() + slot.offset_bytes) % dtype.itemsize:
            raw = raw.clone()
        named[slot.name] = raw.view(dtype).reshape(slot.shape)
    return named
