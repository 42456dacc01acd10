"""Weights by broadcast: rank 0 of a process group that it shares with every engine's ranks.

    prepared ── another group ──> leave the old one, begin to join ── first send ──> joined ──┐
        │                                                                                     │
        └────── the group that is held: nothing to do ────────────────────────────────────────┴──> send ...

    close: committed ──> held for the next transaction       broken ──> aborted, never used again

Rank 0 hosts one TCP store for its lifetime; each group lives under its own prefix of it, the rendezvous that
inference engines use as well. Each group gets a thread and a connection to the store of its own for the calls
that block, so that one stuck in a dead group delays nobody else. Nobody waits for a group but the first
`send`, which ends as soon as the router says that a member did not join.

What the backends share is here; a backend says how a group is made and how a bucket goes through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from abc import abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from milepost.errors import Unavailable
from milepost.types import HandlesOfEngine, Prepared
from milepost_trainer.buckets import Bucket
from milepost_trainer.transports.base import WeightTransport

log = logging.getLogger(__name__)
T = TypeVar("T")


class GroupTransport(WeightTransport):
    """Broadcasts flattened buckets to all members at once.

    Args:
        master_address: under which engines reach this host.
    """

    def __init__(self, *, master_address: str) -> None:
        self.master_address = master_address
        self._store = _listen()
        self.master_port = int(self._store.port)
        self._joining: asyncio.Future[Any] | None = None
        self._size = 0

    @abstractmethod
    def _make(self, name: str, store: Any, *, world_size: int, timeout_s: float) -> Any:
        """Build this rank's end of a group; runs in a thread of its own and may block until `timeout_s`."""

    @abstractmethod
    async def _broadcast(self, group: Any, flat: torch.Tensor) -> None:
        """Push bytes from rank 0; raises RuntimeError where the group broke."""

    async def open(self, prepared: Prepared, *, timeout_s: float) -> None:
        """Begin to form the group with all members, unless it is the one that stands."""
        if self._joining is not None and prepared.group_name == self.group_name:
            return
        self._drop(abort=False)
        self.group_name, self._size = prepared.group_name, prepared.world_size
        self._joining = in_thread(
            lambda: self._join(prepared.group_name, prepared.world_size, timeout_s),
            name=f"join {prepared.group_name}",
        )

    def _join(self, name: str, world_size: int, timeout_s: float) -> Any:
        # A connection of its own: one that waits for a member holds the lock of its connection meanwhile.
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]  # exported, but not declared so
            "127.0.0.1", self.master_port, is_master=False, timeout=timedelta(seconds=timeout_s)
        )
        group = self._make(name, c10d.PrefixStore(name, store), world_size=world_size, timeout_s=timeout_s)
        world: Any = c10d._world  # pyright: ignore[reportPrivateUsage]
        world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
        return group

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
            async with asyncio.timeout(timeout_s):
                await self._broadcast(group, flat)
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
                f"group {self.group_name} of {self._size} did not form in {timeout_s:.0f} s: "
                f"{str(error)[:200] or 'no answer'}"
            ) from error

    async def close(self, *, broken: bool) -> None:
        """Keep the group, unless it is broken: then abort it, now or when it has formed."""
        if broken:
            self._drop(abort=True)

    async def shut_down(self) -> None:
        """Leave the group."""
        self._drop(abort=False)

    def _drop(self, *, abort: bool) -> None:
        joining, self._joining, self.group_name = self._joining, None, ""
        if joining is not None:
            joining.add_done_callback(lambda done: self._leave_joined(done, abort=abort))

    def _leave_joined(self, joining: asyncio.Future[Any], *, abort: bool) -> None:
        if not joining.cancelled() and joining.exception() is None:
            in_thread(lambda: self._leave(joining.result(), abort=abort), name="leave group")

    def _leave(self, group: Any, *, abort: bool) -> None:
        """Let go of a group, in a thread of its own."""
        try:
            if abort:
                group.abort()
            dist.destroy_process_group(group)
        except (RuntimeError, ValueError, KeyError) as error:
            log.warning("a group for weights did not close cleanly: %s", error)


def new_group(backend: str, name: str, store: Any, *, world_size: int, timeout_s: float, **more: Any) -> Any:
    """A group beside the default one, as its rank 0.

    torch has no public way to it; engines use this helper too, and both sides must derive the same keys.
    """
    helper: Any = c10d._new_process_group_helper  # pyright: ignore[reportPrivateUsage]
    timeout = timedelta(seconds=timeout_s)
    group, _ = helper(world_size, 0, [], backend, store, group_name=name, timeout=timeout, **more)
    return group


def in_thread(call: Callable[[], T], *, name: str) -> asyncio.Future[T]:
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


def _listen() -> Any:
    """A store on a free port of all interfaces."""
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]  # exported, but not declared so
        "127.0.0.1",
        0,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
    )
