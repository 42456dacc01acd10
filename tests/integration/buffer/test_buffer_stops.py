"""A buffer that is told to stop while calls keep coming: whoever asks is told UNAVAILABLE, and asks again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launched import Launched, free_port
from milepost import BufferClient
from milepost.channel import NO_RETRY
from milepost.errors import MilepostError, Unavailable
from milepost.types import RunConfig

STOPS = 4
CALLERS = 20


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Launched]]:
    launched: list[Launched] = []
    yield launched
    for each in launched:
        each.end()


async def start(started: list[Launched], address: str, folder: Path) -> Launched:
    flags = ("--listen", address, "--metrics_listen", "", "--data_dir", str(folder / "ledger"))
    started.append(Launched(folder / f"{len(started)}.log", "-m", "milepost_buffer", "serve", *flags))
    assert "ready" in await asyncio.to_thread(started[-1].ready)
    return started[-1]


async def ask_until_it_fails(ask: Callable[[], Awaitable[Any]]) -> MilepostError:
    while True:
        try:
            await ask()
        except MilepostError as error:
            return error


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_calls_to_a_buffer_that_stops(address: str, started: list[Launched], tmp_path: Path) -> None:
    async with BufferClient(address, retry=NO_RETRY) as client, BufferClient(address) as patient:

        def waits() -> Awaitable[Any]:
            who = {"gateway_id": "g", "instance_id": "g1", "max_prompts": 1, "max_wait_s": 5.0}
            return client.lease_prompts("r", **who)

        for stop in range(STOPS):
            buffer = await start(started, address, tmp_path)
            if not stop:
                await patient.create_run("r", config=RunConfig(groups_per_step=4, samples_per_prompt=2))
            await patient.get_run("r")
            asks = [waits] + CALLERS * [lambda: client.get_run("r")]  # the first one keeps the server
            callers = [asyncio.create_task(ask_until_it_fails(ask)) for ask in asks]
            await patient.get_run("r")
            buffer.process.terminate()
            async with asyncio.timeout(60):
                errors = await asyncio.gather(*callers)
                assert await asyncio.to_thread(buffer.process.wait) == 0
            assert {type(error) for error in errors} == {Unavailable}, [str(error) for error in errors]
            assert all(address in str(error) for error in errors)
