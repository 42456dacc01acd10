"""Reading weights out for publication: buckets, or all of them where they lie.

    bucket(b)   one flat tensor on rank 0: every shard gathered, then cast and copied in one kernel
    whole()     every tensor by name on rank 0: where one rank holds them all, the parameters themselves; else
                views of buckets that stay where they are from then on

`resident` buckets are made once and written again, with their views: for engines that keep them mapped.
Others are the transport's to keep, and made anew. Collective, as every call of a backend; the weights are at
rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from milepost_trainer.buckets import Bucket, TensorSlot, read_bucket
from milepost_trainer.world import World

_PORTION_BYTES = 256 * 1024 * 1024
_copy_many: Any = getattr(torch, "_foreach_copy_")  # noqa: B009  (one kernel for many tensors)


class Gathering:
    """Reads the weights of one model.

    Args:
        named: its tensors by name, sharded or not.
        world: the ranks.
        resident: buckets stay where they are.
    """

    def __init__(self, named: Mapping[str, torch.Tensor], world: World, *, resident: bool) -> None:
        self._named, self._world, self._resident = named, world, resident
        self._whole: dict[str, torch.Tensor] = {}
        self._places: tuple[int, ...] = ()
        self._held: dict[int, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}

    def bucket(self, bucket: Bucket) -> torch.Tensor | None:
        """One bucket, on rank 0."""
        with torch.no_grad():
            held = self._place(bucket) if self._world.leads else None
            for slots in _in_portions(bucket.slots):
                parts = [_full(self._named[slot.name].detach()) for slot in slots]
                if held is not None:
                    _write(slots, parts, *held)
            return held[0] if held else None

    def _place(self, bucket: Bucket) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if bucket.index in self._held:
            return self._held[bucket.index]
        flat = torch.empty(bucket.size_bytes, dtype=torch.uint8, device=self._world.device)
        made = flat, read_bucket(bucket, flat)
        if self._resident:
            self._held[bucket.index] = made
        return made

    def whole(self, buckets: Sequence[Bucket]) -> Mapping[str, torch.Tensor]:
        """All weights by name, on rank 0; written when it returns."""
        found = self._where_they_lie() if self._world.size == 1 else self._from(buckets)
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(
                self._world.device
            )  # whoever copies them next knows nothing of our streams
        return found

    def _where_they_lie(self) -> dict[str, torch.Tensor]:
        """The same dict again where no tensor has moved."""
        places = tuple(_local(tensor).data_ptr() for tensor in self._named.values())
        if places != self._places:
            self._whole = {name: _local(tensor.detach()).contiguous() for name, tensor in self._named.items()}
            lies = all(x.data_ptr() == at for x, at in zip(self._whole.values(), places, strict=True))
            self._places = places if lies else ()
        return self._whole

    def _from(self, buckets: Sequence[Bucket]) -> dict[str, torch.Tensor]:
        for bucket in buckets:
            flat = self.bucket(bucket)
            if flat is not None and bucket.slots[0].name not in self._whole:
                self._whole |= read_bucket(bucket, flat)
        return self._whole


def _in_portions(slots: Sequence[TensorSlot]) -> Iterator[list[TensorSlot]]:
    """Slots in portions: so much is whole on every rank at a time."""
    portion: list[TensorSlot] = []
    for slot in slots:
        portion.append(slot)
        if sum(each.size_bytes for each in portion) >= _PORTION_BYTES:
            yield portion
            portion = []
    if portion:
        yield portion


def _write(
    slots: Sequence[TensorSlot],
    parts: Sequence[torch.Tensor],
    flat: torch.Tensor,
    views: Mapping[str, torch.Tensor],
) -> None:
    """Casts and copies tensors to their places: together where they are aligned, which most are."""
    aligned = [
        (views[s.name], part) for s, part in zip(slots, parts, strict=True) if _lies_in(views[s.name], flat)
    ]
    if aligned:
        _copy_many([view for view, _ in aligned], [part for _, part in aligned])
    for slot, part in zip(slots, parts, strict=True):
        view = views[slot.name]
        if not _lies_in(view, flat):
            target = flat[slot.offset_bytes : slot.offset_bytes + slot.size_bytes]
            target.copy_(part.to(view.dtype).contiguous().reshape(-1).view(torch.uint8))


def _lies_in(view: torch.Tensor, flat: torch.Tensor) -> bool:
    """It is a view of the bucket, and no copy for the sake of alignment."""
    return view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """One rank's part of a maybe sharded tensor: all of it, where there is one rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a maybe sharded tensor, on every rank (collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
