"""The deadline of a request, and what stops its clock."""

from __future__ import annotations

import asyncio

from loop_clock import skip
from milepost import errors
from milepost_router import headers
from milepost_router.passage import Deadlines, Passage
from milepost_router.record import EngineRecord


def passage(deadline_s: float) -> Passage:
    return Passage(headers.read([]), b"POST", b"/generate", b"", deadline_s=deadline_s, deadlines=Deadlines())


async def over(made: Passage) -> None:
    async with asyncio.timeout(30):
        while made.over is None:  # noqa: ASYNC110 (its timer is what is tested)
            await asyncio.sleep(0.005)


async def test_a_deadline_passes():
    made = passage(0.05)
    await over(made)
    assert isinstance(made.over, errors.DeadlineExceeded)


async def test_the_clock_stands_still_while_its_engine_is_paused_by_us():
    loop = asyncio.get_running_loop()
    record = EngineRecord("a", "http://a")
    made = passage(1000.0)
    made.given_to(record)
    record.paused_since = loop.time()
    for _ in range(3):
        skip(1000.0)
        await asyncio.sleep(0.1)  # its timer goes off, and again
        assert made.over is None
    assert made.remaining_s() > 900.0
    record.paused_total, record.paused_since = loop.time() - record.paused_since, None
    skip(1000.0)
    await over(made)


async def test_pauses_before_it_came_and_of_engines_it_left_are_told_apart():
    record = EngineRecord("a", "http://a", paused_total=10_000.0)
    made = passage(5000.0)
    made.given_to(record)
    assert made.remaining_s() <= 5000.0
    record.paused_total += 500.0
    made.taken_back()
    record.paused_total += 100_000.0
    assert 5000.0 < made.remaining_s() <= 5500.0
    made.close()


async def test_what_ends_a_request_first_is_what_it_is_told():
    made = passage(0.02)
    made.client_left()
    await asyncio.sleep(0.05)
    assert isinstance(made.over, errors.Cancelled)


async def test_an_answered_request_is_never_ended():
    made = passage(0.01)
    made.close()
    made.client_left()
    await asyncio.sleep(0.03)
    assert made.over is None
