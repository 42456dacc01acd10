"""Calls to all members of a transaction at once, and how long those who lag behind are waited for.

Each call has a deadline of its own; where each member has its own bytes (shm, disk) that is all. In a
collective one member's silence holds up everybody, so nobody waits for a call's whole deadline there:

- after a failure the others have `BROKEN_GROUP_GRACE_S` to notice that the group is broken;
- after the first success the others have as long again and `straggler_s` (a broadcast reaches all members at
  about the same time); who is later is silent, and taken for gone;
- a member that the fleet has given up meanwhile is not waited for at all.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

from milepost_router.engine_api import EngineBroken, EngineFault
from milepost_router.member import Member

BROKEN_GROUP_GRACE_S = 2.0
"""How long members of a collective may take to notice that another one failed."""
_LOOK_S = 0.5

Call = Callable[[Member], Awaitable[None]]
Calls = dict[asyncio.Task[None], Member]


async def call_all(
    members: Sequence[Member], call: Call, *, collective: bool, straggler_s: float = math.inf
) -> dict[Member, EngineFault]:
    """Calls all members at once; returns who failed, and why.

    Args:
      members: of one transaction.
      call: raises EngineFault.
      collective: one member's failure is everybody's.
      straggler_s: see the module.
    """
    faults: dict[Member, EngineFault] = {}

    async def one(member: Member) -> None:
        try:
            await call(member)
        except EngineFault as fault:
            member.gone = member.gone or (isinstance(fault, EngineBroken) and fault.gone)
            faults[member] = fault

    if len(members) == 1 and not collective:
        await one(members[0])  # without a task, which would cost as much as some of the calls
        return faults
    calls = {asyncio.create_task(one(m), name=m.engine_id): m for m in members}
    try:
        late = await _wait(calls, faults, straggler_s) if collective else await _wait_for_all(calls)
    finally:
        for task in calls:
            task.cancel()
    broken = bool(faults)
    for task in late:
        member = calls[task]
        member.gone = member.gone or not broken
        why = "waits in a group that is broken" if broken else "silent, long after others were done"
        faults[member] = EngineBroken(f"{member.engine_id}: {why}", gone=not broken)
    return faults


async def _wait_for_all(calls: Calls) -> set[asyncio.Task[None]]:
    if calls:
        done, _ = await asyncio.wait(calls)
        for task in done:
            task.result()
    return set()


async def _wait(
    calls: Calls, faults: dict[Member, EngineFault], straggler_s: float
) -> set[asyncio.Task[None]]:
    """Waits as long as the rules of a collective want; returns the calls that are given up."""
    clock = asyncio.get_running_loop().time
    begun, give_up_at = clock(), math.inf
    waiting = set(calls)
    while waiting and clock() < give_up_at:
        left_s = max(0.0, give_up_at - clock())
        done, waiting = await asyncio.wait(
            waiting, timeout=min(_LOOK_S, left_s), return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            task.result()
        for task in [x for x in waiting if not calls[x].present]:
            waiting.discard(task)
            faults[calls[task]] = EngineBroken(
                f"{calls[task].engine_id}: the fleet has given it up", gone=True
            )
        now = clock()
        if faults:
            give_up_at = min(give_up_at, now + BROKEN_GROUP_GRACE_S)
        elif done:
            give_up_at = min(give_up_at, now + (now - begun) + straggler_s)
    return waiting
