"""The failure matrix, processes: each of them killed and suspended, in mid-run and in mid-transaction.

One stack lives through all rows; `milepost up` brings back what died. A row passes when two more steps are
then trained and newer weights are served by every engine within a bound that is the sum of the configured
deadlines. The tests at the end judge all rows together: the run finishes, the audit closes in both parts, and
every token was sampled from the weights that its label names.
"""

from __future__ import annotations

import os
import signal

import pytest

from chaos import VICTIMS, Siege
from judges import judge_audit, judge_deadlines, judge_weights
from milepost import RolloutClient
from milepost.errors import DeadlineExceeded
from milepost.types import EngineState
from stack import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KILL, STOP, CONT = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT
TRANSPORT = "gloo"
MOMENTS = {"mid_run": False, "mid_transaction": True}


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [KILL, STOP], ids=["killed", "suspended"])
async def test_row(siege: Siege, victim: str, moment: str, number: signal.Signals) -> None:
    siege.require_whole()
    within_s = siege.deadlines.recovery_s(victim, number)
    pid = await siege.hit(victim, number, in_transaction=MOMENTS[moment])
    await siege.replaced(victim, pid, within_s=within_s)
    await siege.goes_on(f"{victim} {number.name} in {moment}", within_s=within_s)


# ---------------------------------------------------------------------- those who come back too late


async def test_a_trainer_that_was_replaced_commits_nothing_when_it_wakes(siege: Siege) -> None:
    siege.require_whole()
    within_s = siege.deadlines.recovery_s("trainer", STOP)
    with siege.unsupervised():
        late = siege.send("trainer", STOP)
        # More than once: what it had sent before it stopped is through by then.
        committed = max([(await siege.counts()).committed_step for _ in range(3)])
        siege.double("trainer")
        await siege.goes_on("another trainer has taken over", within_s=within_s)
        before = siege.trained()
        os.kill(late, CONT)
        await until("the late trainer has left", lambda: siege.has_ended(late), within_s=within_s)
        await siege.goes_on("the late trainer has left", within_s=within_s)
    after = siege.trained()
    newest = max(before)
    assert newest == max(after)
    assert len(after[newest]) > len(before[newest])
    # It may still write down a commit that the ledger had taken before it was replaced, and no other.
    assert max(after[sorted(after)[-2]]) <= committed
    for steps in after.values():
        assert {step: after[newest].get(step, ids) for step, ids in steps.items()} == steps

    async def noted() -> bool:
        return siege.stack.service("trainer")["state"] == "done"

    await until("milepost up has seen it", noted, within_s=within_s)
    assert siege.stack.service("trainer")["exit_code"] == 3


async def suspended_with_leases(siege: Siege) -> tuple[int, dict[str, int]]:
    """Suspends the gateway while it holds leases; its process id, and prompt -> attempt."""

    async def suspended() -> tuple[int, dict[str, int]] | None:
        pid = siege.send("rollout", STOP)
        if held := await siege.rolling():
            return pid, held
        os.kill(pid, CONT)
        return None

    return await until("the gateway holds leases", suspended, within_s=siege.deadlines.sample_s)


async def test_a_gateway_that_lost_its_leases_seals_nothing_when_it_wakes(siege: Siege) -> None:
    siege.require_whole()
    within_s = siege.deadlines.recovery_s("rollout", STOP)
    with siege.unsupervised():
        late, held = await suspended_with_leases(siege)
        other = siege.double("rollout", "--gateway_id", "other")

        address = await siege.address_of_double("rollout")

        async def taken() -> bool:
            now = await siege.attempts(held)
            async with RolloutClient(address) as gateway:
                sealed = (await gateway.get_status()).groups_sealed
            # Some may be leased to the sleeper once more: its last request still waited in the ledger.
            return sealed > 0 and all(now[prompt_id] > attempt for prompt_id, attempt in held.items())

        with siege.breaks("its leases are another gateway's"):
            await until("its leases are another gateway's", taken, within_s=within_s)
        os.kill(late, CONT)
        await siege.goes_on("the late gateway woke", within_s=within_s)
        other.terminate()
        assert other.wait(within_s) == 0
    await siege.goes_on("the other gateway left", within_s=within_s)


async def test_an_engine_that_slept_through_an_update_serves_nothing_until_it_has_one(siege: Siege) -> None:
    siege.require_whole()
    within_s = siege.deadlines.recovery_s("engine-0", STOP)
    with siege.unsupervised():
        async with siege.held_transaction("engine-0"):
            await siege.goes_on("engine-0 sleeps", within_s=within_s, without=("engine-0",))
            assert await siege.state("engine-0") is not EngineState.SERVING
        await siege.goes_on("engine-0 woke", within_s=within_s)


@pytest.mark.parametrize("victim", ["router", "buffer"])
async def test_a_service_that_sleeps_longer_than_the_deadlines_goes_on(siege: Siege, victim: str) -> None:
    siege.require_whole()
    with siege.unsupervised():
        pid = siege.send(victim, STOP)
        try:
            for _ in range(4):  # each of them ends by its deadline
                with pytest.raises(DeadlineExceeded):
                    await siege.ask(victim)
        finally:
            os.kill(pid, CONT)
        await siege.goes_on(f"{victim} woke", within_s=siege.deadlines.recovery_s(victim, STOP))


# ---------------------------------------------------------------------- the judges


async def test_the_run_finishes_and_the_audit_closes(siege: Siege) -> None:
    siege.require_whole()
    with siege.breaks("the end of the run"):
        await siege.finish()
    await judge_audit(siege)
    print("\n".join(f"{s:6.1f} s  {what}" for what, s in siege.took_s.items()))


async def test_nobody_who_asked_waited_past_the_deadline(siege: Siege) -> None:
    siege.require_whole()
    judge_deadlines(siege)


async def test_every_token_comes_from_the_weights_that_its_label_names(siege: Siege) -> None:
    siege.require_whole()
    await judge_weights(siege)
