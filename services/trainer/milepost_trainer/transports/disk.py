"""Weights through a folder that both sides see: one safetensors file, loaded by path.

Each transaction writes a folder of its own and removes it at the end; all weights travel at once.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from milepost.types import HandlesOfEngine, Prepared, Transport
from milepost_trainer.buckets import Bucket, read_bucket
from milepost_trainer.export import make_readable
from milepost_trainer.transports.base import WeightTransport


class DiskTransport(WeightTransport):
    """Writes a folder; engines read it.

    Args:
        directory: parent of the folders, under a path that holds for engines too.
        run_id: the run, a folder of its own within.
    """

    kind = Transport.DISK
    single_bucket = True

    def __init__(self, *, directory: Path, run_id: str) -> None:
        self._parent = directory.resolve() / run_id
        shutil.rmtree(self._parent, ignore_errors=True)  # what a killed trainer of this run left
        self._folder: Path | None = None

    async def open(self, prepared: Prepared, *, timeout_s: float) -> None:
        """Make the transaction's folder."""
        del timeout_s
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in prepared.transaction_id)
        self._folder = self._parent / safe
        self._folder.mkdir(parents=True)

    async def stage(self, bucket: Bucket, flat: torch.Tensor) -> tuple[HandlesOfEngine, ...]:
        """Write all weights."""
        assert self._folder is not None, "open comes first"
        named = {name: tensor.contiguous() for name, tensor in read_bucket(bucket, flat.cpu()).items()}
        path = self._folder / "model.safetensors"
        await asyncio.to_thread(save_file, named, path, {"format": "pt"})
        make_readable(self._folder)
        return (HandlesOfEngine(handles=(str(self._folder).encode(),)),)

    async def close(self, *, broken: bool) -> None:
        """Remove the folder."""
        del broken
        folder, self._folder = self._folder, None
        if folder is not None:
            await asyncio.to_thread(shutil.rmtree, folder, True)
