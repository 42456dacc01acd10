"""Settings -> transport."""

from __future__ import annotations

from pathlib import Path

from milepost_trainer.settings import PublishSettings
from milepost_trainer.transports.base import WeightTransport


def build_transport(settings: PublishSettings, *, run_id: str) -> WeightTransport:
    """The transport that the settings name."""
    match settings.transport:
        case "gloo":
            from milepost_trainer.transports.gloo import GlooTransport

            return GlooTransport(master_address=settings.master_address)
        case "nccl":
            from milepost_trainer.transports.nccl import NcclTransport

            return NcclTransport(master_address=settings.master_address)
        case "shm":
            from milepost_trainer.transports.shm import ShmTransport

            return ShmTransport()
        case "cuda_ipc":
            from milepost_trainer.transports.cuda_ipc import CudaIpcTransport

            return CudaIpcTransport()
        case "disk":
            from milepost_trainer.transports.disk import DiskTransport

            return DiskTransport(directory=Path(settings.disk_dir), run_id=run_id, mirrors=settings.mirrors)
