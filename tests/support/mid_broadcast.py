"""One of several engines killed while weights are broadcast to all of them, in a whole run.

    all UPDATING ──> trainer stopped ──> all UPDATING a while later ──> kill ──> the trainer goes on
                                             └ else it was too late: it goes on, and the next one is caught

Every engine has an order by then and waits for a trainer that sends nothing more: in the collective, or,
where each bucket has an order of its own, maybe between two of them. However short a publication is, the kill
is in its middle.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from milepost import RouterClient
from milepost.types import Engine, EngineState
from moments import Missed, caught
from stack import Stack, until

HELD_S = 1.0
"""Longer than any publication of these runs takes."""


@dataclass(frozen=True)
class Broken:
    """What became of it.

    Attributes:
      given_up_s: from the kill until the router had no engine in that transaction any more.
      trains_s: until the trainer committed another step.
      serve_s: until every engine served the newest version.
      restarted: engines that were started again.
    """

    given_up_s: float
    trains_s: float
    serve_s: float
    restarted: tuple[str, ...]


async def kill_one(
    stack: Stack, buffer: Any, victim: str, kill: Callable[[], None], *, engines: int, within_s: float
) -> Broken:
    """Kills one of the engines in mid-broadcast, and follows the run until all serve again.

    Args:
      stack: running.
      buffer: its client.
      victim: the engine's name.
      kill: ends that engine's process for good.
      engines: how many there are.
      within_s: for all to serve again.
    """
    async with RouterClient(stack.address("router")) as router:

        async def fleet() -> dict[str, Engine]:
            return {e.engine_id: e for e in (await router.list_engines(stack.run_id)).engines}

        async def held() -> tuple[int, dict[str, Engine]]:
            return await _stop_in_broadcast(stack, router, engines=engines)

        trainer, was = await caught("a broadcast to all engines", held, tries=40)
        try:
            step = (await stack.stats(buffer)).committed_step
            kill()
            begun = time.monotonic()
        finally:
            with contextlib.suppress(ProcessLookupError):  # what failed before is to be told
                os.kill(trainer, signal.SIGCONT)

        async def given_up() -> bool:
            return all(e.state is not EngineState.UPDATING for e in (await fleet()).values())

        async def trains() -> bool:
            return (await stack.stats(buffer)).committed_step > step

        async def serve() -> dict[str, Engine] | None:
            now = await fleet()
            versions = {e.weight_version for e in now.values() if e.state is EngineState.SERVING}
            others = [e for e in now.values() if e.state is not EngineState.SERVING]
            newer = min(versions, default=0) > was[victim].weight_version
            return now if len(now) == engines and not others and newer and len(versions) == 1 else None

        await until("the transaction is given up", given_up, within_s=within_s)
        given_up_s = time.monotonic() - begun
        await until("another step is trained", trains, within_s=within_s)
        trains_s = time.monotonic() - begun
        now = await until("all serve the same newer version", serve, within_s=within_s)
    again = tuple(name for name in sorted(now) if now[name].instance_id != was[name].instance_id)
    return Broken(given_up_s, trains_s, time.monotonic() - begun, again)


async def _stop_in_broadcast(
    stack: Stack, router: RouterClient, *, engines: int
) -> tuple[int, dict[str, Engine]]:
    """Stops the trainer while all engines wait for its bytes; raises `Missed` where it was too late."""
    trainer = (await stack.ready("trainer"))["pid"]
    await _all_updating(stack, router, engines=engines)
    os.kill(trainer, signal.SIGSTOP)
    try:
        await asyncio.sleep(HELD_S)  # what was nearly through is through by then
        found = {e.engine_id: e for e in (await router.list_engines(stack.run_id)).engines}
        if len(found) < engines or any(e.state is not EngineState.UPDATING for e in found.values()):
            raise Missed
    except BaseException:
        os.kill(trainer, signal.SIGCONT)
        raise
    return trainer, found


async def _all_updating(stack: Stack, router: RouterClient, *, engines: int) -> None:
    async with asyncio.timeout(60):
        async for fleet in router.watch_fleet(stack.run_id):
            if sum(e.state is EngineState.UPDATING for e in fleet.engines) == engines:
                return
