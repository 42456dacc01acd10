"""Trainer state on the host while the device has other uses: `trainer.offload`.

    mode         on the host
    none         nothing
    optimizer    optimizer state, but while the optimizer moves and while a checkpoint is written or read
    all          the same, and all weights (the reference model's too) from `rest` until the next call needs
                 them

A shelf moves storages, not tensors: whoever holds a tensor holds it still, and finds its data again after
`fetch`. Host memory is taken once, pinned where the device is CUDA. Copies to the host are waited for before
the device's memory is let go; copies back are ordered with the work that follows and waited for by nobody.
Where a shelf is makes no difference to what a checkpoint holds: state is fetched before it is written.
FSDP2's own CPUOffloadPolicy was passed over: with it the optimizer runs on the CPU, parameters cross the bus
in every pass, one rank alone has no use of it, and it cannot be changed between two calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch.distributed.tensor import DTensor

Offload = Literal["none", "optimizer", "all"]


class Shelf:
    """Tensors that are on the device or on the host, all of them together.

    Args:
        tensors: names them, each time anew.
        enabled: False leaves them where they are, always.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]], *, enabled: bool) -> None:
        self._tensors = tensors
        self._enabled = enabled
        self._hosts: dict[int, torch.Tensor] = {}  # by place in the row of storages
        self._away: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        self.seconds = 0.0
        """Wall seconds that moving took so far."""

    @property
    def is_away(self) -> bool:
        """The data is on the host, and only there."""
        return bool(self._away)

    def put_away(self) -> None:
        """Copy to the host and let go of the device's memory; nothing where that is done."""
        if not self._enabled or self._away:
            return
        begun = time.monotonic()
        moved = [(storage, self._on_host(i, storage)) for i, storage in enumerate(self._storages())]
        for storage, host in moved:
            host.copy_(_bytes_of(storage), non_blocking=True)
        for device in {storage.device for storage, _ in moved if storage.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        for storage, _ in moved:
            storage.resize_(0)
        self._away = moved
        self.seconds += time.monotonic() - begun

    def fetch(self) -> None:
        """Bring the data back; nothing where it is here. May run out of memory, and can be asked again."""
        begun = time.monotonic()
        while self._away:
            storage, host = self._away[-1]
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host, non_blocking=True)
            self._away.pop()
        self.seconds += time.monotonic() - begun

    def _storages(self) -> list[torch.UntypedStorage]:
        """Those of the tensors, each once, in order; memory that belongs to a file stays what it is."""
        found: dict[int, torch.UntypedStorage] = {}
        for tensor in self._tensors():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            if storage.resizable() and storage.nbytes():
                found.setdefault(storage.data_ptr(), storage)
        return list(found.values())

    def _on_host(self, place: int, storage: torch.UntypedStorage) -> torch.Tensor:
        size = storage.nbytes()
        if place not in self._hosts or self._hosts[place].numel() != size:
            pinned = storage.device.type == "cuda"
            self._hosts[place] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return self._hosts[place]


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
