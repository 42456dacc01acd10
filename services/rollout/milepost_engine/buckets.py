"""Flattened buckets: many tensors in one run of bytes.

A bucket is a one-dimensional uint8 buffer in which the tensors of a header lie back to back, in the header's
order, each contiguous in its own dtype, without padding or alignment; tensor i begins where i - 1 ends. This
is the layout of SGLang's `flattened_bucket`. Little-endian, as every machine this runs on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from milepost_engine.errors import UpdateRefused
from milepost_engine.weights import TensorSpec, parse_dtype


def header(names: Sequence[object], dtypes: Sequence[object], shapes: Sequence[object]) -> list[TensorSpec]:
    """Reads the parallel lists that describe an update.

    Raises:
        UpdateRefused: The lists differ in length, are empty, or hold something that is no name, dtype or
        shape.
    """
    if not names or not len(names) == len(dtypes) == len(shapes):
        raise UpdateRefused(
            f"names, dtypes and shapes have {len(names)}, {len(dtypes)} and {len(shapes)} entries: "
            "send one of each per tensor, and at least one tensor"
        )
    return [
        tensor_spec(name, dtype, shape, where=f"[{index}]")
        for index, (name, dtype, shape) in enumerate(zip(names, dtypes, shapes, strict=True))
    ]


def tensor_spec(name: object, dtype: object, shape: object, *, where: str) -> TensorSpec:
    """Checks one tensor's description; `where` is the path that errors name."""
    if not isinstance(name, str) or not name:
        raise UpdateRefused(f"names{where} is {name!r}: it must be a tensor's name")
    if not isinstance(shape, list | tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise UpdateRefused(f"shapes{where} of '{name}' is {shape!r}: it must be a list of sizes")
    return TensorSpec(name, parse_dtype(dtype, where=f"dtypes{where} of '{name}'"), tuple(shape))


def total_bytes(specs: Sequence[TensorSpec]) -> int:
    """Length of the bucket that holds these tensors."""
    return sum(spec.size_bytes for spec in specs)


def split(buffer: torch.Tensor, specs: Sequence[TensorSpec]) -> list[tuple[str, torch.Tensor]]:
    """Views a bucket as its tensors (copied only where the bytes are not aligned for the dtype)."""
    tensors: list[tuple[str, torch.Tensor]] = []
    offset = 0
    for spec in specs:
        tensors.append((spec.name, view(buffer, offset, spec)))
        offset += spec.size_bytes
    return tensors


def view(buffer: torch.Tensor, offset: int, spec: TensorSpec) -> torch.Tensor:
    """The tensor whose bytes begin at `offset` of a uint8 buffer."""
    part = buffer[offset : offset + spec.size_bytes]
    if part.data_ptr() % spec.dtype.itemsize or part.storage_offset() % spec.dtype.itemsize:
        part = part.clone()
    return part.view(spec.dtype).reshape(spec.shape)
