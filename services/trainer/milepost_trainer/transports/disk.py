"""Weights through a folder that both sides see: one safetensors file, loaded by path.

Engines that do not see the folder have a mirror beside them, which fetches the file over HTTP to the same
path. A mirror that fails costs its own engines this publication, not the others.

Each transaction writes a folder of its own and removes it at the end; all weights travel at once.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from milepost import mirror
from milepost.errors import MilepostError
from milepost.types import HandlesOfEngine, Prepared, Transport
from milepost_trainer.buckets import Bucket, read_bucket
from milepost_trainer.export import make_readable
from milepost_trainer.transports.base import WeightTransport

log = logging.getLogger(__name__)


class DiskTransport(WeightTransport):
    """Writes a folder; engines read it.

    Args:
        directory: parent of the folders, under a path that holds for engines too.
        run_id: the run, a folder of its own within.
        mirrors: `host:port` of each mirror.
    """

    kind = Transport.DISK
    single_bucket = True

    def __init__(self, *, directory: Path, run_id: str, mirrors: Sequence[str] = ()) -> None:
        self._run_id, self._mirrors, self._mirror_s = run_id, tuple(mirrors), 0.0
        self._parent = directory.resolve() / run_id
        shutil.rmtree(self._parent, ignore_errors=True)  # what a killed trainer of this run left
        self._folder: Path | None = None

    async def open(self, prepared: Prepared, *, timeout_s: float) -> None:
        """Make the transaction's folder."""
        self._mirror_s = timeout_s / 2  # the other half is for the engines that have the weights
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
        if self._mirrors:
            order = await asyncio.to_thread(mirror.describe, self._folder, run_id=self._run_id)
            await asyncio.gather(*(self._have_mirrored(address, order) for address in self._mirrors))
        return (HandlesOfEngine(handles=(str(self._folder).encode(),)),)

    async def close(self, *, broken: bool) -> None:
        """Remove the folder."""
        del broken
        folder, self._folder = self._folder, None
        if folder is not None:
            await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _have_mirrored(self, address: str, order: mirror.Order) -> None:
        try:
            await asyncio.to_thread(mirror.ask, address, order, timeout_s=self._mirror_s)
        except MilepostError as error:
            log.warning("%s; its engines stay without these weights", error)
