"""Every process of a run dies once, all within a second and in the middle of a weight transaction.

The same twice: all killed, then all suspended, which the supervisor has to find out. Weights travel through
shared memory here. The judges are those of the matrix.
"""

from __future__ import annotations

import os
import signal

import pytest

from chaos import HELD_ENGINE, VICTIMS, Siege
from judges import judge_audit, judge_deadlines, judge_weights
from stack import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
TRANSPORT = "shm"
ALL = (*VICTIMS, HELD_ENGINE)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "suspended"])
async def test_all_die_and_the_run_goes_on(siege: Siege, number: signal.Signals) -> None:
    siege.require_whole()
    async with siege.held_transaction(awake_after=number is signal.SIGKILL):
        pids = await siege.pids(ALL)
        for pid in pids.values():
            os.kill(pid, number)
    within_s = 2 * max(siege.deadlines.recovery_s(victim, number) for victim in ALL)

    async def all_gone() -> bool:
        return all([await siege.has_ended(pid) for pid in pids.values()])

    with siege.breaks("all died"):
        await until("everybody has died", all_gone, within_s=within_s)
    await siege.goes_on(f"all got {number.name}", within_s=within_s)


async def test_the_run_finishes_and_the_audit_closes(siege: Siege) -> None:
    siege.require_whole()
    with siege.breaks("the end of the run"):
        await siege.finish()
    await judge_audit(siege)


async def test_nobody_who_asked_waited_past_the_deadline(siege: Siege) -> None:
    siege.require_whole()
    judge_deadlines(siege)


async def test_every_token_comes_from_the_weights_that_its_label_names(siege: Siege) -> None:
    siege.require_whole()
    await judge_weights(siege)
