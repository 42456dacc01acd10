"""The step loop's waits."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from milepost import types as t
from milepost.errors import FailedPrecondition
from milepost_trainer.loop import StepLoop
from milepost_trainer.publisher import Published
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.status import TrainerState


@pytest.fixture
def publisher() -> Any:
    return SimpleNamespace(changed=asyncio.Event(), wanted=False, retry_in_s=30.0)


async def test_a_change_that_needs_nothing_ends_one_wait_only(publisher: Any) -> None:
    absent: Any = None
    ledger: Any = SimpleNamespace(restated=None, full=asyncio.Event())
    loop = StepLoop(
        TrainerSettings.model_construct(),
        ledger=ledger, crew=absent, publisher=publisher, saver=absent, recorder=absent,
        state=TrainerState(run_id="run", world_size=1), stop=asyncio.Event(),
    )  # fmt: skip
    awaited = asyncio.get_running_loop().create_future()
    awaited_task: Any = asyncio.ensure_future(awaited)
    publisher.changed.set()
    async with asyncio.timeout(30):
        assert not await loop._tend(awaited_task)  # pyright: ignore[reportPrivateUsage]
    assert not publisher.changed.is_set()


class ForgetfulLedger:
    """Refuses the first lease; what was restated waits for the loop."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.full = asyncio.Event()
        self.restated: t.ResumePoint | None = None

    async def lease(self, step: int, *, max_wait_s: float) -> t.StepLease:
        self.asked.append(step)
        if len(self.asked) == 1:
            raise FailedPrecondition("the step before it is not leased")
        return t.StepLease(groups=(t.StepGroup(prompt_id="p", num_tokens=(3,)),))

    async def read_run(self) -> Any:
        return SimpleNamespace(config=t.RunConfig())


async def nothing(*args: Any) -> None:
    return None


async def test_a_lease_that_was_refused_ahead_of_its_time_is_asked_for_again(publisher: Any) -> None:
    absent: Any = None
    ledger: Any = ForgetfulLedger()
    crew: Any = SimpleNamespace(call=nothing)
    told: list[Published] = []
    publisher.forgotten = told.append
    state = TrainerState(run_id="run", world_size=1)
    loop = StepLoop(
        TrainerSettings.model_construct(),
        ledger=ledger, crew=crew, publisher=publisher, saver=absent, recorder=absent,
        state=state, stop=asyncio.Event(),
    )  # fmt: skip
    async with asyncio.timeout(30):
        lease = await loop._await_lease(2)  # pyright: ignore[reportPrivateUsage]
    assert lease is not None
    assert [g.prompt_id for g in lease.groups] == ["p"]
    assert ledger.asked == [2, 2]
    ledger.restated = t.ResumePoint(published_version=3, published_label=1)
    await loop._publish()  # pyright: ignore[reportPrivateUsage]
    assert told == [Published(3, 1)]
    assert state.save_wanted, "a checkpoint holds what Redis lost"
