"""The settle loop against a ledger that answers as told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from milepost.errors import InvalidArgument, ResourceExhausted, Unavailable
from milepost.types import (
    DropReason,
    Group,
    GroupHeader,
    LeaseKey,
    ReleaseResult,
    SealResult,
    SealStatus,
)
from milepost_rollout.settle import MAX_ITEMS, Item, Settler
from milepost_rollout.status import Counters
from milepost_rollout.verdict import Release


class FakeLedger:
    """Answers puts with a function of the group; keeps every call."""

    def __init__(self) -> None:
        self.status: Callable[[Group], SealStatus] = lambda group: SealStatus.SEALED
        self.puts: list[list[str]] = []
        self.releases: list[dict[str, Any]] = []
        self.fail: list[Exception] = []
        self.failed = asyncio.Event()

    def _maybe_fail(self) -> None:
        if self.fail:
            self.failed.set()
            raise self.fail.pop(0)

    async def put_groups(self, run_id: str, *, groups: Sequence[Group]) -> tuple[SealResult, ...]:
        self._maybe_fail()
        self.puts.append([g.header.prompt_id for g in groups])
        return tuple(
            SealResult(prompt_id=g.header.prompt_id, status=self.status(g), message="the reason")
            for g in groups
        )

    async def release_prompts(
        self, run_id: str, *, instance_id: str, leases: Iterable[LeaseKey], **how: Any
    ) -> ReleaseResult:
        self._maybe_fail()
        self.releases.append({"ids": [k.prompt_id for k in leases], **how})
        return ReleaseResult()


def seal(prompt_id: str, *, size: int = 10, attempt: int = 1) -> Item:
    header = GroupHeader(prompt_id=prompt_id, attempt=attempt, rewards=(1.0, float("nan")))
    return Item(
        key=LeaseKey(prompt_id=prompt_id, attempt=attempt), group=Group(header=header, payload=b"x" * size)
    )


def release(prompt_id: str, **how: Any) -> Item:
    return Item(key=LeaseKey(prompt_id=prompt_id, attempt=1), release=Release(**how))


class Setup:
    def __init__(self, **options: Any) -> None:
        self.ledger = FakeLedger()
        self.counters = Counters()
        self.settled: list[str] = []
        self.settler = Settler(
            self.ledger,
            run_id="r",
            instance_id="i",
            counters=self.counters,
            on_settled=lambda key: self.settled.append(key.prompt_id),
            **options,
        )

    async def settle(self, *items: Item) -> None:
        for item in items:
            self.settler.submit(item)
        task = asyncio.create_task(self.settler.run())
        try:
            async with asyncio.timeout(30):
                await self.settler.drained()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_groups_go_in_batches_and_are_counted():
    s = Setup()
    await s.settle(*(seal(f"p{i}") for i in range(MAX_ITEMS + 3)))
    assert [len(p) for p in s.ledger.puts] == [MAX_ITEMS, 3]
    assert s.settled == [f"p{i}" for i in range(MAX_ITEMS + 3)]
    assert s.counters.groups_sealed == MAX_ITEMS + 3
    assert s.counters.reward_mean == 1.0


async def test_large_groups_do_not_share_a_message():
    s = Setup()
    await s.settle(*(seal(f"p{i}", size=7 * 1024 * 1024) for i in range(3)))
    assert [len(p) for p in s.ledger.puts] == [1, 1, 1]


async def test_releases_of_one_kind_go_together():
    s = Setup()
    filtered = {"drop_reason": DropReason.FILTER, "detail": "equal"}
    await s.settle(
        release("a", **filtered),
        release("b", failed=True, exhausted_reason=DropReason.REWARD_ERROR, detail="x" * 5000),
        release("c", **filtered),
    )
    first, second = s.ledger.releases
    assert (first["ids"], first["drop_reason"], first["failed"]) == (["a", "c"], DropReason.FILTER, False)
    assert (second["ids"], second["exhausted_reason"], second["failed"]) == (
        ["b"],
        DropReason.REWARD_ERROR,
        True,
    )
    assert len(second["detail"]) <= 2000
    assert dict(s.counters.settled) == {"dropped_filter": 2, "failed": 1}


@pytest.mark.parametrize(
    "status", [SealStatus.DUPLICATE, SealStatus.LEASE_LOST, SealStatus.CONFLICT, SealStatus.UNKNOWN_PROMPT]
)
async def test_what_cannot_be_sealed_any_more_is_forgotten(status: SealStatus):
    s = Setup()
    s.ledger.status = lambda group: status
    await s.settle(seal("p"))
    assert s.settled == ["p"]
    assert s.counters.groups_sealed == 0
    assert s.counters.settled[status.name.lower()] == 1


async def test_an_unknown_version_is_put_again_and_holds_nobody_up():
    s = Setup()
    answers = {"late": [SealStatus.UNKNOWN_VERSION, SealStatus.UNKNOWN_VERSION]}
    s.ledger.status = lambda g: (answers.get(g.header.prompt_id) or [SealStatus.SEALED]).pop(0)
    await s.settle(seal("late"), *(seal(f"p{i}") for i in range(MAX_ITEMS)))
    assert s.settled[-1] == "late"
    assert sum("late" in p for p in s.ledger.puts) == 3
    assert s.counters.groups_sealed == MAX_ITEMS + 1


async def test_a_version_that_is_never_published_costs_the_group_and_not_the_prompt():
    s = Setup(version_wait_s=0.0)
    s.ledger.status = lambda group: SealStatus.UNKNOWN_VERSION
    await s.settle(seal("p"))
    (how,) = s.ledger.releases
    assert (how["ids"], how["failed"], how["drop_reason"]) == (["p"], False, DropReason.UNSPECIFIED)
    assert "the reason" in how["detail"]
    assert s.settled == ["p"]


async def test_a_group_that_breaks_the_contract_is_released_as_failed():
    s = Setup()
    s.ledger.status = lambda group: (
        SealStatus.INVALID if group.header.prompt_id == "bad" else SealStatus.SEALED
    )
    await s.settle(seal("bad"), seal("good"))
    (how,) = s.ledger.releases
    assert how["ids"] == ["bad"]
    assert (how["failed"], how["exhausted_reason"]) == (True, DropReason.INVALID)
    assert "the reason" in how["detail"]
    assert set(s.settled) == {"bad", "good"}


async def test_a_batch_that_is_refused_as_a_whole_is_released_as_failed():
    s = Setup()
    s.ledger.fail = [InvalidArgument("groups: too many bytes")]
    await s.settle(seal("a"), seal("b"))
    (how,) = s.ledger.releases
    assert how["ids"] == ["a", "b"]
    assert "too many bytes" in how["detail"]


async def test_a_full_redis_is_waited_for_and_no_reason_to_give_groups_up():
    s = Setup()
    s.ledger.fail = [ResourceExhausted("full", reason="REDIS_FULL", retry_after_s=0.001) for _ in range(2)]
    await s.settle(seal("p"))
    assert s.ledger.releases == []
    assert s.counters.groups_sealed == 1


async def test_nothing_is_thrown_away_while_the_ledger_is_away():
    s = Setup()
    s.ledger.fail = [Unavailable("redis is away", retry_after_s=0.001) for _ in range(3)]
    task = asyncio.create_task(s.settle(seal("p"), release("q")))
    await s.ledger.failed.wait()
    assert s.settled == []
    await task
    assert sorted(s.settled) == ["p", "q"]
    assert s.counters.ledger == ""
