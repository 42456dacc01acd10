"""Payloads of a step: those that came along with its lease, and those that are fetched."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from milepost import types as t
from milepost_trainer.service import Fetcher


class Asked:
    """Answers with the names in capitals, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.names: list[list[str]] = []

    async def fetch_groups(
        self, run_id: str, *, prompt_ids: Sequence[str]
    ) -> AsyncIterator[tuple[str, bytes]]:
        self.names.append(list(prompt_ids))
        for name in prompt_ids:
            yield name, name.upper().encode()


def lease(*names: str, came: int) -> t.StepLease:
    groups = tuple(t.StepGroup(prompt_id=name) for name in names)
    return t.StepLease(groups=groups, payloads=tuple(f"came {name}".encode() for name in names[:came]))


async def test_only_what_did_not_come_along_is_fetched() -> None:
    asked: Any = Asked()
    fetch = Fetcher(asked, "run")
    fetch.take(lease("a", "b", "c", came=2))
    assert await fetch(["a", "b", "c"]) == {"a": b"came a", "b": b"came b", "c": b"C"}
    assert asked.names == [["c"]]


async def test_a_step_that_is_asked_for_again_is_fetched() -> None:
    asked: Any = Asked()
    fetch = Fetcher(asked, "run")
    fetch.take(lease("a", came=1))
    assert await fetch(["a"]) == {"a": b"came a"}
    assert await fetch(["a"]) == {"a": b"A"}


async def test_payloads_of_an_earlier_lease_are_not_taken_for_those_of_a_later_one() -> None:
    asked: Any = Asked()
    fetch = Fetcher(asked, "run")
    fetch.take(lease("a", "b", came=2))
    fetch.take(lease("a", "c", came=0))
    assert await fetch(["a", "c"]) == {"a": b"A", "c": b"C"}
