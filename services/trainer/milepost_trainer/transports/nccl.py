"""Weights by broadcast over NCCL, from rank 0's GPU to those of every engine's ranks; see ``groups``.

    gather bucket k+1 on the current stream ......
    stage k: an event ──> own stream: broadcast k ── flush: wait for all that was sent, with a deadline

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
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from milepost.errors import FailedPrecondition, Unavailable
from milepost.types import HandlesOfEngine, Prepared, Transport
from milepost_trainer.buckets import Bucket
from milepost_trainer.launch import speak_nccl_as_engines_do
from milepost_trainer.transports.cuda_ipc import gpu_uuid
from milepost_trainer.transports.groups import GroupTransport, in_thread, new_group

_LOOK_S = 0.0005
_LIBRARY = "libnccl.so.2"
_WATCHDOG_S = 24 * 3600.0
_HANDS_OFF = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
_making = threading.Lock()


class NcclTransport(GroupTransport):
    """Broadcasts flattened buckets from this GPU to all members at once."""

    kind = Transport.NCCL

    def __init__(self, *, master_address: str) -> None:
        super().__init__(master_address=master_address)
        speak_nccl_as_engines_do()
        self.nccl_version = nccl_version()
        self._stream: Any = None
        self._gathered: Any = None
        self._over: list[Any] = []

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
        await super().open(prepared, timeout_s=timeout_s)

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
            flat.record_stream(stream)

        await in_thread(enqueue, name="broadcast")

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
