"""Weights between processes that share a GPU: engines open the bucket's memory by a CUDA IPC handle.

    base64(pickle({"flattened_tensor": <handle>, "metadata": [one a tensor: name, dtype, shape, start, end]}))

So SGLang reads it at `update_weights_from_tensor`, as a flattened_bucket. It names nothing but torch and
builtins, so the trainer needs no SGLang; and it goes through the router unread, to the engine's rank on the
very GPU of rank 0, which both name by UUID. One handle a rank: each counts its own readers.

Every bucket stays where it is until the transaction is over: an engine's answer says that its copies are
enqueued, and only the commit waits for them.
"""

from __future__ import annotations

import base64
import inspect
import pickle
from types import SimpleNamespace
from typing import Any

import torch
from torch.multiprocessing import reductions

from milepost.errors import FailedPrecondition
from milepost.types import HandlesOfEngine, Prepared, Transport, WeightMember
from milepost_trainer.buckets import DTYPES, Bucket
from milepost_trainer.transports.base import WeightTransport


class CudaIpcTransport(WeightTransport):
    """Shares buckets where they lie; nothing is copied here."""

    kind = Transport.CUDA_IPC

    def __init__(self) -> None:
        self._members: tuple[WeightMember, ...] = ()
        self._kept: list[torch.Tensor] = []

    async def open(self, prepared: Prepared, *, timeout_s: float) -> None:
        """Remember who takes part."""
        del timeout_s
        self._members = prepared.members

    async def stage(self, bucket: Bucket, flat: torch.Tensor) -> tuple[HandlesOfEngine, ...]:
        """Make a handle for each rank of each member.

        Raises:
            FailedPrecondition: the weights are not on a GPU, or a member is not on theirs.
        """
        if flat.device.type != "cuda":
            raise FailedPrecondition(
                f"trainer.publish.transport = 'cuda_ipc', but the weights are on {flat.device}; set "
                "trainer.device to cuda, or choose another transport"
            )
        here = gpu_uuid(flat.device)
        for member in self._members:
            _require_here(member, here)
        self._kept.append(flat)
        return tuple(
            HandlesOfEngine(
                engine_id=member.engine_id,
                handles=tuple(_payload(bucket, flat, here) for _ in range(member.tensor_parallel_size)),
            )
            for member in self._members
        )

    async def close(self, *, broken: bool) -> None:
        """Let go of the buckets; what an engine still reads lives until it is done."""
        del broken
        self._members = ()
        if self._kept:
            self._kept.clear()
            torch.cuda.ipc_collect()


def gpu_uuid(device: torch.device) -> str:
    """A GPU's UUID as the driver's tools write it, "GPU-..."."""
    properties: Any = torch.cuda.get_device_properties(device)
    return f"GPU-{properties.uuid}"


def _require_here(member: WeightMember, here: str) -> None:
    if any(uuid != here for uuid in member.gpu_uuids) or not member.gpu_uuids:
        on = ", ".join(member.gpu_uuids) or "GPUs that nobody named"
        raise FailedPrecondition(
            f"engine {member.engine_id} runs on {on}, the trainer's rank 0 on {here}; cuda_ipc needs one GPU "
            "for both: start them on the same one, or choose another transport"
        )


def _payload(bucket: Bucket, flat: torch.Tensor, here: str) -> bytes:
    """One handle to a bucket, with the places of its tensors."""
    content = {
        "flattened_tensor": _SharedTensor(flat, here.removeprefix("GPU-")),
        "metadata": [
            SimpleNamespace(
                name=slot.name,
                dtype=DTYPES[slot.dtype],
                shape=slot.shape,
                start_idx=slot.offset_bytes,
                end_idx=slot.offset_bytes + slot.size_bytes,
                numel=slot.size_bytes,
            )
            for slot in bucket.slots
        ],
    }
    return base64.b64encode(pickle.dumps(content))


class _SharedTensor:
    """Pickles as the call that opens a tensor of another process.

    torch names the tensor's device by its index, which is another GPU where other GPUs are visible. SGLang
    takes a UUID in its place.
    """

    def __init__(self, tensor: torch.Tensor, uuid: str) -> None:
        rebuild, arguments = reductions.reduce_tensor(tensor)
        place = list(inspect.signature(rebuild).parameters).index("storage_device")
        self._call = rebuild, (*arguments[:place], uuid, *arguments[place + 1 :])

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call
