"""The ranks of one trainer: who I am, and how I reach the others.

    torchrun --RANK, WORLD_SIZE, MASTER_*--> join() --> World --> leave()

Metadata travels as small objects over a gloo group of its own ("control"), so that it never waits behind, nor
mixes with, the collectives of the model. With one rank there is no process group at all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class World:
    """The ranks of this trainer.

    Attributes:
        rank: mine, from 0; rank 0 leads.
        size: how many there are.
        device: where my parameters live.
        mesh: one-dimensional mesh of all ranks; None where there is one rank and no process group.
        control: gloo group for metadata; None like ``mesh``.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def take_device(self) -> None:
        """Make my device the calling thread's own: CUDA remembers it by thread, and begins with the first."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def broadcast(self, value: Any) -> Any:
        """Hand rank 0's small object to every rank; blocks until rank 0 sends."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over all ranks, in float64."""
        if self.control is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's small object, in rank order, on rank 0; an empty list elsewhere."""
        if self.control is None:
            return [value]
        box: list[Any] | None = [None] * self.size if self.leads else None
        dist.gather_object(value, box, dst=0, group=self.control)
        return box or []

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's small object, in rank order, on every rank."""
        if self.control is None:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.control)
        return box

    def any_failed(self, failed: bool) -> bool:
        """True when any rank says so: ranks decide alike, and none waits for one that gave up."""
        return self.sum([float(failed)])[0] > 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])


def join(*, timeout_s: float, device: str = "auto", force_group: bool = False) -> World:
    """Join the other ranks as torchrun's environment says.

    Args:
        timeout_s: deadline of every collective.
        device: "cpu", "cuda", or "auto" for CUDA where there is any.
        force_group: make a process group even for one rank (sharding with mixed precision wants a mesh).

    Returns:
        This rank's world.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    here = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(here)
    if size == 1 and not force_group:
        return World(device=here)
    timeout = timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    mesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
    return World(rank, size, here, mesh, control)


def leave(world: World) -> None:
    """Close the process groups; harmless where there are none."""
    if world.control is not None and dist.is_initialized():
        dist.destroy_process_group()
