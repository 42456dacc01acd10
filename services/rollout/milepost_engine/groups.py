"""Process groups over which a trainer broadcasts weights, by name.

    (none) --init--> JOINING --all members there--> OPEN --destroy--> (none)
                        |                            |
                        +------ failed, late --------+--> (none), and the name is free again

The rendezvous is the one SGLang uses, so one trainer serves both: rank 0 hosts a TCPStore at
`master_address:master_port`, wrapped in `PrefixStore(group_name)`, and every member builds its group with
torch's own helper beside, never as, the default process group.

Nothing here blocks the event loop and nothing waits without a deadline: joining runs on an executor of its
own and is bounded by the group's timeout; receiving starts the collectives and waits on their futures, so
`destroy` ends a receive at once. A collective that was given up stays in gloo's own thread until the group's
timeout, writing to a staging buffer that nobody reads. The destructor of a group waits for such a collective
*and keeps the interpreter lock meanwhile*, so the last reference to a broken group is kept in `_limbo` until
its collectives have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from milepost_engine import buckets
from milepost_engine.errors import UpdateRefused
from milepost_engine.weights import TensorSpec

logger = logging.getLogger(__name__)

BACKENDS = ("gloo",)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """One membership.

    Attributes:
        name: Chosen by the trainer; fresh for every transaction.
        master_address, master_port: Where rank 0 hosts the store.
        rank: Of this engine.
        world_size: Members, the trainer included.
        backend: "gloo".
    """

    name: str
    master_address: str
    master_port: int
    rank: int
    world_size: int
    backend: str

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UpdateRefused(f"backend is '{self.backend}': this engine runs on the CPU and has 'gloo'")
        if not 1 <= self.rank < self.world_size:
            raise UpdateRefused(
                f"rank_offset is {self.rank} and world_size {self.world_size}: an engine's rank lies in "
                "[1, world_size), rank 0 being the trainer"
            )
        if not 0 < self.master_port < 65536:
            raise UpdateRefused(f"master_port is {self.master_port}: it must lie in [1, 65535]")
        if not self.name:
            raise UpdateRefused("group_name is empty: name the group")


@dataclass(slots=True, eq=False)
class _Group:
    spec: GroupSpec
    handle: dist.ProcessGroup
    arrivals: list[asyncio.Future[None]] = field(default_factory=list[asyncio.Future[None]])
    in_gloo: int = 0  # collectives that gloo has not ended, whether or not anybody waits for them


class GroupRegistry:
    """The groups this engine is a member of. Lives on the event loop.

    Args:
        timeout_s: Deadline for joining a group, and of every collective in it.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._groups: dict[str, _Group] = {}
        self._joining: set[str] = set()
        self._limbo: set[_Group] = set()
        # A join that waits for a dead member keeps its thread until the timeout: none may queue behind.
        self._executor = ThreadPoolExecutor(max_workers=64, thread_name_prefix="engine-group")

    async def init(self, spec: GroupSpec) -> None:
        """Joins a group; returns once every member has.

        Raises:
            UpdateRefused: The name is taken, or the members did not meet within the timeout.
        """
        if spec.name in self._groups or spec.name in self._joining:
            raise UpdateRefused(
                f"group_name '{spec.name}' exists already: destroy it first, or use a fresh name"
            )
        self._joining.add(spec.name)
        loop = asyncio.get_running_loop()
        joining = loop.run_in_executor(self._executor, _join, spec, self._timeout_s)
        try:
            # The store and the group have deadlines of their own; twice that is for both in a row.
            handle = await asyncio.wait_for(asyncio.shield(joining), 2 * self._timeout_s + 1.0)
        except (RuntimeError, TimeoutError, ValueError, OSError) as error:
            joining.add_done_callback(_leave_late)
            raise UpdateRefused(
                f"group '{spec.name}' of {spec.world_size} did not form within {self._timeout_s:g} s at "
                f"{spec.master_address}:{spec.master_port}: {str(error)[:300]}"
            ) from error
        finally:
            self._joining.discard(spec.name)
        self._groups[spec.name] = _Group(spec, handle)

    def destroy(self, name: str) -> None:
        """Leaves a group; a receive in progress in it fails at once.

        Raises:
            UpdateRefused: There is no such group.
        """
        group = self._groups.pop(name, None)
        if group is None:
            raise UpdateRefused(f"group_name '{name}' is not open: open are {sorted(self._groups)}")
        for arrival in group.arrivals:
            if not arrival.done():
                arrival.set_exception(
                    UpdateRefused("the group was destroyed while weights were on their way")
                )
        if group.in_gloo:
            self._limbo.add(group)
        _leave(group.handle)

    def require(self, name: str) -> None:
        """Checks that a group is open.

        Raises:
            UpdateRefused: It is not.
        """
        if name not in self._groups:
            raise UpdateRefused(
                f"group_name '{name}' is not open (open are {sorted(self._groups)}): "
                "call /init_weights_update_group first"
            )

    async def receive(
        self, name: str, specs: Sequence[TensorSpec], *, flattened: bool, timeout_s: float
    ) -> list[tuple[str, torch.Tensor]]:
        """Receives the broadcasts of rank 0 into fresh memory.

        Args:
            name: The group.
            specs: What will come, in order.
            flattened: One bucket of all bytes, instead of one broadcast a tensor.
            timeout_s: Deadline for all of it.

        Raises:
            UpdateRefused: A member died, the deadline passed or the group was destroyed. The group is gone
            then,
                for the members no longer agree on what comes next.
        """
        self.require(name)
        group = self._groups[name]
        if flattened:
            landing = [torch.empty(buckets.total_bytes(specs), dtype=torch.uint8)]
        else:
            landing = [torch.empty(spec.shape, dtype=spec.dtype) for spec in specs]
        try:
            await self._collect(group, landing, timeout_s)
        except UpdateRefused:
            if self._groups.get(name) is group:
                self.destroy(name)
            raise
        if flattened:
            return buckets.split(landing[0], specs)
        return [(spec.name, tensor) for spec, tensor in zip(specs, landing, strict=True)]

    async def _collect(self, group: _Group, landing: list[torch.Tensor], timeout_s: float) -> None:
        try:
            group.arrivals = [self._broadcast(group, tensor) for tensor in landing if tensor.numel()]
        except RuntimeError as error:
            raise UpdateRefused(f"group '{group.spec.name}' is broken: {str(error)[:300]}") from error
        if not group.arrivals:
            return
        done, late = await asyncio.wait(
            group.arrivals, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION
        )
        failures = [error for arrival in done if (error := arrival.exception()) is not None]
        for arrival in late:
            arrival.cancel()
        group.arrivals = []
        if failures:
            raise UpdateRefused(
                f"broadcast in group '{group.spec.name}' failed: {str(failures[0])[:300]}"
            ) from failures[0]
        if late:
            raise UpdateRefused(f"weights of group '{group.spec.name}' did not arrive within {timeout_s:g} s")

    def _broadcast(self, group: _Group, tensor: torch.Tensor) -> asyncio.Future[None]:
        """Starts receiving one tensor; the future is set on the event loop when its bytes are there."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[None] = loop.create_future()

        def settle(error: BaseException | None) -> None:
            group.in_gloo -= 1
            if not group.in_gloo:
                self._limbo.discard(group)
            if arrived.done():
                return
            if error is None:
                arrived.set_result(None)
            else:
                arrived.set_exception(error)

        def on_done(future: Any) -> None:
            error: BaseException | None = None
            try:
                future.value()
            except RuntimeError as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(settle, error)

        work: Any = dist.broadcast(tensor, src=0, group=group.handle, async_op=True)
        group.in_gloo += 1
        work.get_future().add_done_callback(on_done)
        return arrived

    def close(self) -> None:
        """Leaves every group; nothing can be joined any more."""
        for name in list(self._groups):
            self.destroy(name)
        self._executor.shutdown(wait=False, cancel_futures=True)


def _join(spec: GroupSpec, timeout_s: float) -> dist.ProcessGroup:
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage] (exported, but not declared so)
        spec.master_address, spec.master_port, spec.world_size, is_master=False, timeout=timeout
    )
    # torch has no public way to build a group beside the default one; SGLang uses this helper too.
    helper: Any = c10d._new_process_group_helper  # pyright: ignore[reportPrivateUsage]
    handle, _ = helper(
        spec.world_size,
        spec.rank,
        [],
        spec.backend,
        c10d.PrefixStore(spec.name, store),
        group_name=spec.name,
        timeout=timeout,
    )
    world: Any = c10d._world  # pyright: ignore[reportPrivateUsage]
    world.pg_group_ranks[handle] = {rank: rank for rank in range(spec.world_size)}
    return handle


def _leave_late(joining: asyncio.Future[dist.ProcessGroup]) -> None:
    """A join that was given up and then succeeded leaves at once."""
    if not joining.cancelled() and joining.exception() is None:
        _leave(joining.result())


def _leave(handle: dist.ProcessGroup) -> None:
    try:
        dist.destroy_process_group(handle)
    except (RuntimeError, ValueError, KeyError):
        logger.exception("a weight update group did not close cleanly")
