"""Weights by broadcast over gloo: rank 0 of a group of its own, one group a transaction.

Rank 0 hosts one TCP store for its lifetime; each group lives under its own prefix of it, the rendezvous that
inference engines use for NCCL as well. A group that breaks is aborted and never used again. Each group gets a
thread and a connection to the store of its own for the calls that block, so that one stuck in a dead group
delays nobody else. Nobody waits for a group but the first `send`, which ends as soon as the router says that
a member did not join.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from milepost.errors import Unavailable
from milepost.types import HandlesOfEngine, Prepared, Transport
from milepost_trainer.buckets import Bucket
from milepost_trainer.transports.base import WeightTransport

log = logging.getLogger(__name__)
T = TypeVar("T")


class GlooTransport(WeightTransport):
    """Broadcasts flattened buckets to all members at once.

    Args:
        master_address: under which engines reach this host.
    """

    kind = Transport.GLOO

    def __init__(self, *, master_address: str) -> None:
        self.master_address = master_address
        self._store = _listen()
        self.master_port = int(self._store.port)
        self._joining: asyncio.Future[Any] | None = None
        self._name = ""

    async def open(self, prepared: Prepared, *, timeout_s: float) -> None:
        """Begin to form the group with all members."""
        self._name = f"{prepared.group_name} of {prepared.world_size}"
        self._joining = _in_thread(
            lambda: _join(self.master_port, prepared.group_name, prepared.world_size, timeout_s),
            name=f"join {prepared.group_name}",
        )

    async def stage(self, bucket: Bucket, flat: torch.Tensor) -> tuple[HandlesOfEngine, ...]:
        """Nothing to stage: the header alone tells engines what comes."""
        del bucket, flat
        return ()

    async def send(self, bucket: Bucket, flat: torch.Tensor, *, timeout_s: float) -> None:
        """Broadcast a bucket's bytes, once the group stands."""
        if not bucket.size_bytes:
            return
        group = await self._joined(timeout_s)
        try:
            sent = _broadcast(group, flat.cpu())
            async with asyncio.timeout(timeout_s):
                await sent
        except (RuntimeError, TimeoutError) as error:
            raise Unavailable(
                f"bucket {bucket.index} was not taken by all members: {str(error)[:200] or 'deadline passed'}"
            ) from error

    async def _joined(self, timeout_s: float) -> Any:
        assert self._joining is not None, "open comes first"
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._joining)
        except (RuntimeError, TimeoutError, ValueError) as error:
            raise Unavailable(
                f"group {self._name} did not form in {timeout_s:.0f} s: {str(error)[:200] or 'no answer'}"
            ) from error

    async def close(self, *, broken: bool) -> None:
        """Leave the group, now or when it has formed; a broken one is aborted first."""
        joining, self._joining = self._joining, None
        if joining is not None:
            joining.add_done_callback(lambda done: _leave_joined(done, abort=broken))


def _listen() -> Any:
    """A store on a free port of all interfaces."""
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]  # exported, but not declared so
        "127.0.0.1",
        0,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
    )


def _join(port: int, name: str, world_size: int, timeout_s: float) -> Any:
    # A connection of its own: one that waits for a member holds the lock of its connection meanwhile.
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]  # exported, but not declared so
        "127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout_s)
    )
    # torch has no public way to build a group beside the default one; engines use this helper too, and both
    # sides must derive the same keys.
    helper: Any = c10d._new_process_group_helper  # pyright: ignore[reportPrivateUsage]
    timeout = timedelta(seconds=timeout_s)
    group, _ = helper(
        world_size, 0, [], "gloo", c10d.PrefixStore(name, store), group_name=name, timeout=timeout
    )
    world: Any = c10d._world  # pyright: ignore[reportPrivateUsage]
    world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def _leave(group: Any, *, abort: bool) -> None:
    try:
        if abort:
            group.abort()
        dist.destroy_process_group(group)
    except (RuntimeError, ValueError, KeyError) as error:
        log.warning("a group for weights did not close cleanly: %s", error)


def _leave_joined(joining: asyncio.Future[Any], *, abort: bool) -> None:
    if not joining.cancelled() and joining.exception() is None:
        _in_thread(lambda: _leave(joining.result(), abort=abort), name="leave group")


def _in_thread(call: Callable[[], T], *, name: str) -> asyncio.Future[T]:
    """Run a call on a thread of its own that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # pyright: ignore[reportArgumentType]  # T where there is no error

    def body() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = call()
        except Exception as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=body, name=name, daemon=True).start()
    return future


def _broadcast(group: Any, tensor: torch.Tensor) -> asyncio.Future[None]:
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
