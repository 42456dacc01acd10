"""Weights by broadcast over NCCL, from rank 0's GPU to those of every engine's ranks; see ``groups``.

    gather bucket k+1 on the current stream ......
    stage k: an event ──> own stream: broadcast k ── flush: wait for all that was sent, with a deadline

Members that were launched with our hook are told once of all buckets, and take them as they are broadcast
(`milepost_engine.weight_receiver`); from the second time on the order names the layout alone. Others are told
of each bucket.

A broadcast is only enqueued, so the next bucket is gathered meanwhile; the host waits once, at the end. The
first one of a group forms its communicator, which blocks a thread until all ranks are there.

NCCL waits for ever for a rank that is gone, so every wait here has a deadline, and who gives up aborts the
communicator. torch must not do that by itself: it would end this process. A group that is over is aborted
too, since an orderly end waits for ranks that may be gone, and it is never given back to the garbage
collector, whose thread would wait for NCCL's.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections import deque
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from milepost.errors import FailedPrecondition, Unavailable
from milepost.types import HandlesOfEngine, Prepared, Transport, WeightMember
from milepost_trainer.buckets import Bucket
from milepost_trainer.launch import speak_nccl_as_engines_do
from milepost_trainer.transports.cuda_ipc import gpu_uuid
from milepost_trainer.transports.groups import GroupTransport, in_thread, new_group
from milepost_trainer.transports.orders import encode, pushed

_LOOK_S = 0.0005
_DEPTH = 2
"""Buckets that are on their way at a time, at either end."""
_LIBRARY = "libnccl.so.2"
_WATCHDOG_S = 24 * 3600.0
_HANDS_OFF = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
_making = threading.Lock()


class NcclTransport(GroupTransport):
    """Broadcasts flattened buckets from this GPU to all members at once."""

    kind = Transport.NCCL
    prepares_ahead = True  # members that join do not wait for rank 0

    def __init__(self, *, master_address: str) -> None:
        super().__init__(master_address=master_address)
        speak_nccl_as_engines_do()
        self.nccl_version = nccl_version()
        self._stream: Any = None
        self._gathered: Any = None
        self._over: list[Any] = []
        self._pushes = False
        self._sent: deque[Any] = deque()
        self._members: tuple[WeightMember, ...] = ()
        self._know: set[tuple[str, str]] = set()  # engines, by instance, that have the layout

    async def open(self, prepared: Prepared, *, timeout_s: float) -> None:
        """Begin to form the group with all members, unless it is the one that stands.

        Raises:
            FailedPrecondition: there is no GPU here, or a member is on this one.
        """
        if not torch.cuda.is_available():
            raise FailedPrecondition(
                "trainer.publish.transport = 'nccl', but this process sees no GPU; set trainer.device to "
                "cuda, or choose another transport"
            )
        here = gpu_uuid(torch.device("cuda", torch.cuda.current_device()))
        for member in prepared.members:
            if here in member.gpu_uuids:
                raise FailedPrecondition(
                    f"engine {member.engine_id} runs on {here}, as the trainer's rank 0 does, and NCCL wants "
                    "a GPU for each; start them on different ones, or publish by cuda_ipc"
                )
        self._members, self._pushes = prepared.members, self.announces(prepared)
        self._sent.clear()
        await super().open(prepared, timeout_s=timeout_s)

    def announces(self, prepared: Prepared) -> bool:
        """Every member was launched with our hook."""
        return bool(prepared.members) and all(member.weight_hook for member in prepared.members)

    def announce(
        self, prepared: Prepared, buckets: Sequence[Bucket], *, timeout_s: float
    ) -> tuple[HandlesOfEngine, ...]:
        """One order a rank: in full for members that do not know what lies in which bucket."""
        return tuple(
            HandlesOfEngine(
                engine_id=member.engine_id,
                handles=(
                    encode(
                        pushed(
                            prepared.transaction_id,
                            buckets,
                            group=prepared.group_name,
                            timeout_s=timeout_s,
                            depth=0 if (member.engine_id, member.instance_id) in self._know else _DEPTH,
                        )
                    ),
                ),
                load_format=member.weight_hook,
            )
            for member in prepared.members
        )

    def taken(self, engine_ids: Collection[str]) -> None:
        """Who received them knows the layout from now on."""
        self._know |= {
            (m.engine_id, m.instance_id) for m in self._members if m.engine_id in engine_ids and m.instance_id
        }

    async def close(self, *, broken: bool) -> None:
        """Keep the group, unless it is broken; members are then told all of the layout again."""
        if broken:
            self._know.clear()
        await super().close(broken=broken)

    def _make(self, name: str, store: Any, *, world_size: int, timeout_s: float) -> Any:
        del (
            timeout_s
        )  # the watchdog's, which must outlive the group; what waits here has deadlines of its own
        with _making, _environment(_HANDS_OFF):
            return new_group("nccl", name, store, world_size=world_size, timeout_s=_WATCHDOG_S)

    async def stage(self, bucket: Bucket, flat: torch.Tensor) -> tuple[HandlesOfEngine, ...]:
        """Remember when the bucket is whole: what is gathered after it is not waited for."""
        if flat.device.type != "cuda":
            raise FailedPrecondition(
                f"trainer.publish.transport = 'nccl', but the weights are on {flat.device}; set "
                "trainer.device to cuda, or choose another transport"
            )
        self._gathered = torch.cuda.current_stream(flat.device).record_event()
        return await super().stage(bucket, flat)

    async def _broadcast(self, group: Any, flat: torch.Tensor) -> None:
        stream = self._stream = self._stream or torch.cuda.Stream(flat.device)
        gathered = self._gathered

        def enqueue() -> None:
            with torch.cuda.stream(stream):
                stream.wait_event(gathered)
                dist.broadcast(flat, src=0, group=group)
                self._sent.append(stream.record_event())
            flat.record_stream(stream)

        await in_thread(enqueue, name="broadcast")

    async def unstage(self, bucket: Bucket) -> None:
        """Do not run ahead of the GPU, where no answers are waited for: every bucket under way is memory."""
        del bucket
        while self._pushes and len(self._sent) > _DEPTH:
            if self._sent[0].query():
                self._sent.popleft()
            else:
                await asyncio.sleep(_LOOK_S)

    async def flush(self, *, timeout_s: float) -> None:
        """Wait until every broadcast has ended.

        Raises:
            Unavailable: they did not, or the communicator failed.
        """
        if self._stream is None:
            return
        through = self._stream.record_event()
        try:
            async with asyncio.timeout(timeout_s):
                while not through.query():  # noqa: ASYNC110 (a GPU raises no events here)
                    await asyncio.sleep(_LOOK_S)
        except (RuntimeError, TimeoutError) as error:
            why = str(error)[:200] or f"no end within {timeout_s:.0f} s"
            raise Unavailable(f"the weights did not reach all members of {self.group_name}: {why}") from error

    def _leave(self, group: Any, *, abort: bool) -> None:
        del abort
        self._over.append(group)
        super()._leave(group, abort=True)


def nccl_version() -> str:
    """Of the NCCL that torch runs with, "2.28.9"; empty where it has none.

    torch itself names the one that it was built with, whatever was installed in its place since.
    """
    if not dist.is_nccl_available():
        return ""
    return loaded_nccl() or ".".join(str(part) for part in nccl.version())


def loaded_nccl() -> str:
    """The release of the library that this process has loaded; empty where it has none."""
    try:
        library = ctypes.CDLL(_LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        code = ctypes.c_int()
        if library.ncclGetVersion(ctypes.byref(code)):
            return ""
    except (OSError, AttributeError):
        return ""
    major, rest = divmod(code.value, 10_000)
    return f"{major}.{rest // 100}.{rest % 100}"


@contextmanager
def _environment(changes: dict[str, str]) -> Generator[None]:
    """Variables as C++ reads them while a group is made, and as they were after it."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
