"""Weights between processes that see one GPU: engines open the trainer's memory by CUDA IPC handles.

    members with our hook    share: one order for all weights, where they lie; nothing is gathered, and from
                             the second time on nothing but a signal travels (see ``orders``)
    any other member         buckets, as SGLang reads a flattened_bucket at `update_weights_from_tensor`:
                             base64(pickle({"flattened_tensor": <handle>, "metadata": [one a tensor]}))

Pickles name nothing but torch and builtins, so the trainer needs no SGLang; they go through the router
unread, to the engine's ranks. An engine over several GPUs of this host must have rank 0's among them: its
ranks on the others see it too, and read what they need of it from there (over NVLink, as peers). A handle
names the GPU of its reader, by its UUID: opened for the GPU that holds the memory, it would be a tensor of
another device, of which SGLang makes a copy before anybody sees it. Plans would read that copy for ever.

One handle a rank: each counts its own readers. Every bucket stays where it is until the transaction is over:
an engine's answer says that its copies are enqueued, and only the commit waits for them. The hook answers
once its copies are done. With each order goes a stamp, a number that also lies in the trainer's memory: the
hook reads it there, so that nobody takes a copy for that memory unnoticed.
"""

from __future__ import annotations

import base64
import inspect
import pickle
import uuid
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.multiprocessing import reductions

from milepost.errors import FailedPrecondition
from milepost.types import HandlesOfEngine, Prepared, TensorSpec, Transport, WeightMember
from milepost_trainer.buckets import DTYPES, Bucket
from milepost_trainer.transports.base import WeightTransport
from milepost_trainer.transports.orders import STAMP, Layout, encode


class CudaIpcTransport(WeightTransport):
    """Shares buckets where they lie; nothing is copied here."""

    kind = Transport.CUDA_IPC
    prepares_ahead = True

    def __init__(self) -> None:
        self._members: tuple[WeightMember, ...] = ()
        self._kept: list[torch.Tensor] = []
        self._owner = uuid.uuid4().hex
        self._layout: Layout | None = None
        self._stamp = torch.zeros(1, dtype=torch.int64)
        self._num_orders = 0
        self._know: set[tuple[str, str]] = set()  # engines, by instance, that have the layout open

    async def open(self, prepared: Prepared, *, timeout_s: float) -> None:
        """Remember who takes part."""
        del timeout_s
        self._members = prepared.members

    def shares(self, prepared: Prepared) -> bool:
        """Every member was launched with our hook."""
        return bool(prepared.members) and all(member.weight_hook for member in prepared.members)

    async def share(
        self, prepared: Prepared, manifest: Sequence[TensorSpec], weights: Mapping[str, torch.Tensor]
    ) -> tuple[HandlesOfEngine, ...]:
        """One order a rank: in full for members that do not know where the weights lie.

        Raises:
            FailedPrecondition: the weights are not on a GPU, or a member is not on theirs.
        """
        device = weights[manifest[0].name].device
        here = self._here(device)
        layout = Layout.of(self._owner, manifest, weights, self._layout)
        if layout is not self._layout:
            self._layout, self._know = layout, set()
            self._stamp = self._stamp.to(device)
        self._num_orders += 1
        self._stamp.fill_(self._num_orders)
        _at_rest(device)
        return tuple(self._ordered(prepared, member, layout, here) for member in prepared.members)

    def _ordered(
        self, prepared: Prepared, member: WeightMember, layout: Layout, here: str
    ) -> HandlesOfEngine:
        knows = (member.engine_id, member.instance_id) in self._know
        text = layout.order(prepared.transaction_id, whole=not knows, stamp=self._num_orders)
        named = () if knows else ((STAMP, self._stamp), *layout.segments)
        return HandlesOfEngine(
            engine_id=member.engine_id,
            handles=tuple(
                encode(text, [(name, _SharedTensor(x, reader, here=here)) for name, x in named])
                for reader in member.gpu_uuids
            ),
            load_format=member.weight_hook,
            signal=text if knows else "",
        )

    def taken(self, engine_ids: Collection[str]) -> None:
        """Who copied knows the layout from now on; who failed is told all of it again."""
        self._know = {
            (m.engine_id, m.instance_id) for m in self._members if m.engine_id in engine_ids and m.instance_id
        } | {known for known in self._know if known[0] not in {m.engine_id for m in self._members}}

    async def stage(self, bucket: Bucket, flat: torch.Tensor) -> tuple[HandlesOfEngine, ...]:
        """Make a handle for each rank of each member.

        Raises:
            FailedPrecondition: the weights are not on a GPU, or a member is not on theirs.
        """
        here = self._here(flat.device)
        self._kept.append(flat)
        _at_rest(flat.device)
        return tuple(
            HandlesOfEngine(
                engine_id=member.engine_id,
                handles=tuple(
                    _payload(bucket, _SharedTensor(flat, reader, here=here)) for reader in member.gpu_uuids
                ),
            )
            for member in self._members
        )

    def _here(self, device: torch.device) -> str:
        """The GPU of the weights, which every member must see."""
        if device.type != "cuda":
            raise FailedPrecondition(
                f"trainer.publish.transport = 'cuda_ipc', but the weights are on {device}; set "
                "trainer.device to cuda, or choose another transport"
            )
        here = gpu_uuid(device)
        for member in self._members:
            _require_here(member, here)
        return here

    async def close(self, *, broken: bool) -> None:
        """Let go of the buckets; what an engine still reads lives until it is done."""
        if broken:
            self._know.clear()
        self._members = ()
        if self._kept:
            self._kept.clear()
            torch.cuda.ipc_collect()


def gpu_uuid(device: torch.device) -> str:
    """A GPU's UUID as the driver's tools write it, "GPU-..."."""
    properties: Any = torch.cuda.get_device_properties(device)
    return f"GPU-{properties.uuid}"


def _require_here(member: WeightMember, here: str) -> None:
    if here not in member.gpu_uuids:
        on = ", ".join(member.gpu_uuids) or "GPUs that nobody named"
        raise FailedPrecondition(
            f"engine {member.engine_id} runs on {on}, the trainer's rank 0 on {here}; cuda_ipc needs that "
            "one among the engine's: start it there, or choose another transport"
        )


def _at_rest(device: torch.device) -> None:
    """Waits for what this thread has enqueued: who reads from another GPU cannot wait for it there."""
    torch.cuda.current_stream(device).synchronize()


def _payload(bucket: Bucket, flat: _SharedTensor) -> bytes:
    """One handle to a bucket, with the places of its tensors."""
    content = {
        "flattened_tensor": flat,
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
    """Pickles as the call that opens a tensor of another process, for one reader.

    torch names the tensor's device by its index, which is another GPU where other GPUs are visible. SGLang
    takes a UUID in its place.

    Args:
        tensor: what lies here, at rest.
        reader: the GPU of who opens it.
        here: the tensor's.
    """

    def __init__(self, tensor: torch.Tensor, reader: str, *, here: str) -> None:
        rebuild, arguments = reductions.reduce_tensor(tensor)
        given = dict(zip(inspect.signature(rebuild).parameters, arguments, strict=True))
        given["storage_device"] = reader.removeprefix("GPU-")
        if reader != here:
            given["event_sync_required"] = False  # an event of another GPU; it has happened
        self._call = rebuild, tuple(given.values())

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call
