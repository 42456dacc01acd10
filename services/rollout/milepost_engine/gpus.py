"""GPUs that this process may use, as NVIDIA's driver names them, and its NCCL; no torch, no CUDA context.

An engine's ranks are found by them where an index would mean another GPU in another container.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
from collections.abc import Sequence

log = logging.getLogger(__name__)

QUERY_S = 20.0


async def uuids(indices: Sequence[int], *, visible: str | None = None) -> tuple[str, ...]:
    """UUIDs of GPUs by their index among the visible ones; empty where they cannot be told.

    Args:
      indices: counted as CUDA counts them, from 0.
      visible: CUDA_VISIBLE_DEVICES; unset: this process's.
    """
    listing = await _listing()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
    found = among(listing, chosen, indices)
    if len(found) < len(indices):
        log.warning("the GPUs %s cannot be told by UUID, so weights cannot go by cuda_ipc", list(indices))
        return ()
    return found


def among(listing: Sequence[str], visible: str | None, indices: Sequence[int]) -> tuple[str, ...]:
    """The UUIDs of indices among what CUDA_VISIBLE_DEVICES leaves of a listing; those that exist."""
    names = (
        list(listing) if visible is None else [_named(listing, part.strip()) for part in visible.split(",")]
    )
    return tuple(names[i] for i in indices if 0 <= i < len(names) and names[i])


def _named(listing: Sequence[str], part: str) -> str:
    """One entry of CUDA_VISIBLE_DEVICES: an index, or the beginning of a UUID."""
    if part.isdecimal():
        return listing[int(part)] if int(part) < len(listing) else ""
    return next((uuid for uuid in listing if part and uuid.startswith(part)), "")


def nccl_version() -> str:
    """The NCCL of this environment, as in "2.28.9"; empty where not exactly one package brings it."""
    found = {
        each.version
        for each in importlib.metadata.distributions()
        if str(each.metadata["Name"]).startswith("nvidia-nccl-cu")
    }
    return found.pop() if len(found) == 1 else ""


async def _listing() -> list[str]:
    """UUIDs of all GPUs of this host, in the driver's order."""
    command = ("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return []
    try:
        async with asyncio.timeout(QUERY_S):
            printed, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return []
    return [line.strip() for line in printed.decode().splitlines() if line.startswith("GPU-")]
