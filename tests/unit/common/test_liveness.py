"""Three looks in a row that find nobody, and not one fewer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from milepost.errors import Unavailable
from milepost_common.liveness import LOOKS, until_silent


class Process:
    """Answers looks by a script: True answers, False refuses, None never comes back."""

    def __init__(self, script: Iterable[bool | None]) -> None:
        self._script = iter(script)
        self.looks = 0

    async def look(self, within_s: float) -> None:
        answer = next(self._script)
        self.looks += 1
        if answer is None:
            await asyncio.Event().wait()
        if not answer:
            raise Unavailable(f"look {self.looks} was refused")


async def test_failures_in_a_row_are_silence() -> None:
    process = Process([True, True, False, False, False])
    assert await until_silent(process.look, timeout_s=0.03) == "look 5 was refused"


async def test_an_answer_in_between_starts_over() -> None:
    process = Process([False, False, True, False, None, True, False, False, False])
    await until_silent(process.look, timeout_s=0.03)
    assert process.looks == 9


async def test_looks_that_never_come_back_end_by_their_deadline() -> None:
    process = Process([None] * LOOKS)
    assert await until_silent(process.look, timeout_s=0.03) == "no answer within 0.01 s"


async def test_a_defect_in_a_look_is_not_silence() -> None:
    async def look(within_s: float) -> None:
        raise KeyError(within_s)

    with pytest.raises(KeyError):
        await until_silent(look, timeout_s=0.03)
