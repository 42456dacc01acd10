"""Weights through shared memory: a JSON descriptor that names a file under /dev/shm, never a pickle.

The descriptor, one string per tensor-parallel rank (this engine has one):

    {"kind": "shm", "path": "/dev/shm/<name>", "size_bytes": N,
     "tensors": [{"name": str, "dtype": "bfloat16", "shape": [..], "offset_bytes": int}, ...]}

The sender writes the file, calls, and may unlink it once it has the reply: the engine maps it privately for
the length of the call and writes nothing to it. The file must be a regular one lying directly in /dev/shm,
and every tensor must lie within `size_bytes`, itself at most the file's length; all of this is checked before
a byte is read.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

import torch

from milepost_engine.buckets import tensor_spec, view
from milepost_engine.errors import UpdateRefused
from milepost_engine.weights import TensorSpec

SHM_ROOT = "/dev/shm"


@dataclass(frozen=True, slots=True)
class ShmDescriptor:
    """A checked descriptor.

    Attributes:
        path: The file, directly under /dev/shm.
        size_bytes: Bytes of it that matter.
        tensors: What lies in it.
        offsets: Where each tensor begins, in bytes.
    """

    path: str
    size_bytes: int
    tensors: list[TensorSpec]
    offsets: list[int]


def parse_descriptor(serialized: object) -> ShmDescriptor:
    """Reads `serialized_named_tensors` as far as it can be read without touching the file.

    Raises:
        UpdateRefused: It is not one JSON descriptor of the form above.
    """
    if not isinstance(serialized, list) or len(serialized) != 1 or not isinstance(serialized[0], str):
        raise UpdateRefused(
            "serialized_named_tensors must be a list of one JSON descriptor string: this engine has one rank"
        )
    try:
        raw = json.loads(serialized[0])
    except ValueError as error:
        raise UpdateRefused(
            f"serialized_named_tensors[0] is not JSON ({error}): send a shm descriptor; pickles are not read"
        ) from error
    if not isinstance(raw, dict) or raw.get("kind") != "shm":
        raise UpdateRefused("serialized_named_tensors[0].kind must be 'shm', the one kind this engine reads")
    return _checked(cast(dict[str, Any], raw))


def _checked(raw: dict[str, Any]) -> ShmDescriptor:
    path, size, entries = raw.get("path"), raw.get("size_bytes"), raw.get("tensors")
    if not isinstance(path, str) or not _directly_in_shm(path):
        raise UpdateRefused(f"path is {path!r}: it must name a file directly in {SHM_ROOT}")
    if type(size) is not int or size < 0:
        raise UpdateRefused(f"size_bytes is {size!r}: it must be the number of bytes in the file")
    if not isinstance(entries, list) or not entries:
        raise UpdateRefused(f"tensors is {entries!r}: it must be a list with at least one tensor")
    specs: list[TensorSpec] = []
    offsets: list[int] = []
    for index, entry in enumerate(cast(list[Any], entries)):
        spec, offset = _entry(entry, index)
        if offset + spec.size_bytes > size:
            raise UpdateRefused(
                f"tensor '{spec.name}' ends at byte {offset + spec.size_bytes} but size_bytes is {size}: "
                "correct offset_bytes, shape or dtype"
            )
        specs.append(spec)
        offsets.append(offset)
    return ShmDescriptor(path, size, specs, offsets)


def _entry(entry: object, index: int) -> tuple[TensorSpec, int]:
    if not isinstance(entry, dict):
        raise UpdateRefused(f"tensors[{index}] is {entry!r}: it must be an object")
    fields = cast(dict[str, Any], entry)
    spec = tensor_spec(fields.get("name"), fields.get("dtype"), fields.get("shape"), where=f"[{index}]")
    offset = fields.get("offset_bytes")
    if type(offset) is not int or offset < 0:
        raise UpdateRefused(f"tensors[{index}].offset_bytes is {offset!r}: it must be a position in the file")
    return spec, offset


def _directly_in_shm(path: str) -> bool:
    pure = PurePosixPath(path)
    return str(pure.parent) == SHM_ROOT and pure.name not in ("", ".", "..") and "\0" not in path


def read_shm(descriptor: ShmDescriptor) -> list[tuple[str, torch.Tensor]]:
    """Maps the file and views its tensors; the mapping lives as long as they do.

    Raises:
        UpdateRefused: The file is missing, is no regular file, or is shorter than it is said to be.
    """
    try:
        handle = os.open(descriptor.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise UpdateRefused(f"path '{descriptor.path}' cannot be opened: {error.strerror}") from error
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise UpdateRefused(f"path '{descriptor.path}' is not a regular file")
        if info.st_size < descriptor.size_bytes:
            raise UpdateRefused(
                f"path '{descriptor.path}' holds {info.st_size} bytes but size_bytes is "
                f"{descriptor.size_bytes}"
            )
        if descriptor.size_bytes == 0:
            buffer = torch.empty(0, dtype=torch.uint8)
        else:
            # A private mapping: torch wants writable memory, and the sender's file is not ours to write.
            mapping = mmap.mmap(handle, descriptor.size_bytes, access=mmap.ACCESS_COPY)
            buffer = torch.frombuffer(mapping, dtype=torch.uint8)
    finally:
        os.close(handle)
    pairs = zip(descriptor.tensors, descriptor.offsets, strict=True)
    return [(spec.name, view(buffer, offset, spec)) for spec, offset in pairs]
