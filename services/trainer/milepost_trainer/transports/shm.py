"""Weights through shared memory of one host: a file in /dev/shm for each bucket, named by a JSON descriptor.

    {"kind": "shm", "path": "/dev/shm/...", "size_bytes": N,
     "tensors": [{"name": ..., "dtype": ..., "shape": [...], "offset_bytes": ...}, ...]}

The file lives from staging until all members have answered. Names carry this process's id, so that a later
trainer can remove what a killed one left behind.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import torch

from milepost.types import HandlesOfEngine, Prepared, Transport
from milepost_trainer.buckets import Bucket
from milepost_trainer.transports.base import WeightTransport

_PREFIX = "milepost."


class ShmTransport(WeightTransport):
    """Writes each bucket once; engines map it."""

    kind = Transport.SHM
    prepares_ahead = True

    def __init__(self, *, root: Path = Path("/dev/shm")) -> None:
        """Remove what dead trainers left in ``root``."""
        self._root = root
        self._count = 0
        self._staged: dict[int, Path] = {}
        for leftover in root.glob(f"{_PREFIX}*"):
            if not _owner_lives(leftover.name):
                leftover.unlink(missing_ok=True)

    async def open(self, prepared: Prepared, *, timeout_s: float) -> None:
        """Nothing to open."""
        del prepared, timeout_s

    async def stage(self, bucket: Bucket, flat: torch.Tensor) -> tuple[HandlesOfEngine, ...]:
        """Write the bucket's file."""
        self._count += 1
        path = self._root / f"{_PREFIX}{os.getpid()}.{self._count}"
        self._staged[bucket.index] = path
        await asyncio.to_thread(_write, path, flat)
        descriptor = {
            "kind": "shm",
            "path": str(path),
            "size_bytes": bucket.size_bytes,
            "tensors": [
                {
                    "name": slot.name,
                    "dtype": slot.dtype,
                    "shape": slot.shape,
                    "offset_bytes": slot.offset_bytes,
                }
                for slot in bucket.slots
            ],
        }
        return (HandlesOfEngine(handles=(json.dumps(descriptor).encode(),)),)

    async def unstage(self, bucket: Bucket) -> None:
        """Remove the bucket's file."""
        self._staged.pop(bucket.index).unlink(missing_ok=True)

    async def close(self, *, broken: bool) -> None:
        """Remove what is still staged."""
        del broken
        while self._staged:
            self._staged.popitem()[1].unlink(missing_ok=True)


def _write(path: Path, flat: torch.Tensor) -> None:
    with path.open("xb") as file:
        file.write(flat.cpu().numpy().data)


def _owner_lives(name: str) -> bool:
    owner = name.removeprefix(_PREFIX).split(".")[0]
    return not owner.isdigit() or Path(f"/proc/{owner}").exists()
