"""The step loop's waits."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from milepost_trainer.loop import StepLoop
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.status import TrainerState


@pytest.fixture
def publisher() -> Any:
    return SimpleNamespace(changed=asyncio.Event(), wanted=False, retry_in_s=30.0)


async def test_a_change_that_needs_nothing_ends_one_wait_only(publisher: Any) -> None:
    absent: Any = None
    ledger: Any = SimpleNamespace(restated=None)
    loop = StepLoop(
        TrainerSettings.model_construct(),
        ledger=ledger, crew=absent, publisher=publisher, saver=absent, recorder=absent,
        state=TrainerState(run_id="run", world_size=1), stop=asyncio.Event(),
    )  # fmt: skip
    awaited = asyncio.get_running_loop().create_future()
    awaited_task: Any = asyncio.ensure_future(awaited)
    publisher.changed.set()
    async with asyncio.timeout(10):
        assert not await loop._tend(awaited_task)  # pyright: ignore[reportPrivateUsage]
    assert not publisher.changed.is_set()
