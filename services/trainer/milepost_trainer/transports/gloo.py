"""Weights by broadcast over gloo, between CPUs; see ``groups``."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import torch
import torch.distributed as dist

from milepost.types import Transport
from milepost_trainer.transports.groups import GroupTransport, new_group


class GlooTransport(GroupTransport):
    """Broadcasts flattened buckets to all members at once; its group forms when all members are there."""

    kind = Transport.GLOO

    def _make(self, name: str, store: Any, *, world_size: int, timeout_s: float) -> Any:
        return new_group("gloo", name, store, world_size=world_size, timeout_s=timeout_s)

    async def _broadcast(self, group: Any, flat: torch.Tensor) -> None:
        await _through(group, flat.cpu())


def _through(group: Any, tensor: torch.Tensor) -> asyncio.Future[None]:
    """Start a broadcast from rank 0; the future is set on the event loop when it is through."""
    loop = asyncio.get_running_loop()
    through: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if through.done():
            return
        if error is None:
            through.set_result(None)
        else:
            through.set_exception(error)

    def on_done(future: Any) -> None:
        error: BaseException | None = None
        try:
            future.value()
        except RuntimeError as caught:
            error = caught
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, error)

    work: Any = dist.broadcast(tensor, src=0, group=group, async_op=True)
    work.get_future().add_done_callback(on_done)
    return through
