"""One look at a child: grpc.health.v1 where it serves gRPC, else GET /health.

Both are answered by the event loop of the child. Work that takes long (a trainer's step, an engine's batch)
runs on other threads: silence means that the process is stopped, swapped out or stuck, not that it is busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from milepost.cli.health import check, check_url


async def ask_health(addresses: Mapping[str, str], *, timeout_s: float) -> None:
    """Asks a child for its health.

    Args:
      addresses: `host:port` by protocol, from its readiness line.
      timeout_s: deadline of the answer.

    Raises:
      MilepostError: nobody answers, late, or not well.
    """
    if "grpc" in addresses:
        await check(addresses["grpc"], timeout_s=timeout_s, wait_for_ready=True)
    else:
        await asyncio.to_thread(check_url, f"http://{addresses['http']}/health", timeout_s=timeout_s)
