"""Weight versions: numbers are names, labels are ages."""

from __future__ import annotations

import asyncio

import pytest

from milepost import errors
from milepost import types as t


async def reserve(bench, step: int, attempt: int, *, at_least: int = 0) -> int:
    return await bench.ledger.versions.reserve(
        bench.run_id, term=bench.term, step=step, attempt=attempt, at_least=at_least
    )


async def publish(bench, version: int, label: int, **options) -> t.WeightVersion:
    return await bench.ledger.versions.publish(
        bench.run_id, term=bench.term, version=version, label=label, **options
    )


async def newest(bench) -> tuple[int, int]:
    version = await bench.ledger.versions.get(bench.run_id)
    return version.version, version.label


async def test_reservation_is_idempotent_by_its_arguments_and_burns_numbers(bench) -> None:
    first = await reserve(bench, 1, 1)
    assert await reserve(bench, 1, 1) == first
    assert await reserve(bench, 1, 2) == first + 1
    assert await reserve(bench, 2, 1) == first + 2
    assert await reserve(bench, 3, 1, at_least=50) == 50
    assert await reserve(bench, 3, 1, at_least=50) == 50
    assert await reserve(bench, 3, 1, at_least=60) == 60  # an engine holds 59: the number must rise
    assert await reserve(bench, 4, 1) == 61


async def test_a_version_is_published_with_the_label_it_was_reserved_for(bench) -> None:
    version = await reserve(bench, 1, 1)
    with pytest.raises(errors.FailedPrecondition, match="reserved for step 1"):
        await publish(bench, version, 2)
    done = await publish(bench, version, 1, members=["e1", "e2"])
    assert (done.state, done.members, done.label) == (t.VersionState.PUBLISHED, ("e1", "e2"), 1)
    assert done.published_at is not None
    assert await publish(bench, version, 1) == done  # asked again
    assert await newest(bench) == (version, 1)


async def test_a_label_below_the_published_one_needs_permission(bench) -> None:
    high, low = await reserve(bench, 5, 1), await reserve(bench, 3, 1)
    await publish(bench, high, 5)
    with pytest.raises(errors.FailedPrecondition, match="allow_older_label"):
        await publish(bench, low, 3)
    await publish(bench, low, 3, allow_older_label=True)
    assert await newest(bench) == (low, 3)


async def test_the_same_label_may_be_published_under_a_new_number(bench) -> None:
    await publish(bench, await reserve(bench, 1, 1), 1)
    again = await reserve(bench, 1, 2)
    await publish(bench, again, 1)
    assert await newest(bench) == (again, 1)


async def test_a_late_publication_is_recorded_and_moves_nothing(bench) -> None:
    late, quick = await reserve(bench, 1, 1), await reserve(bench, 2, 1)
    await bench.put(1)
    (lease,) = await bench.lease(1)
    await publish(bench, quick, 2)
    assert await bench.seal([lease], versions=(late,)) == [t.SealStatus.UNKNOWN_VERSION]
    await publish(bench, late, 1)
    assert await newest(bench) == (quick, 2)
    assert await bench.seal([lease], versions=(late,)) == [t.SealStatus.SEALED]
    assert (await bench.row(lease.prompt_id)).label == 1


async def test_an_older_number_cannot_overtake_with_a_newer_label(bench) -> None:
    early, later = await reserve(bench, 9, 1), await reserve(bench, 1, 1)
    await publish(bench, later, 1)
    with pytest.raises(errors.FailedPrecondition, match="reserve a new number"):
        await publish(bench, early, 9)


async def test_a_new_term_burns_what_older_ones_reserved(bench) -> None:
    version = await reserve(bench, 1, 1)
    await bench.open_term()
    with pytest.raises(errors.FailedPrecondition, match="burned"):
        await publish(bench, version, 1)
    row = await bench.ledger.versions.get(bench.run_id, version=version)
    assert row.state == t.VersionState.VOID
    assert await reserve(bench, 1, 1) == version + 1


async def test_unknown_versions_and_restated_ones(bench) -> None:
    await reserve(bench, 1, 1, at_least=10)
    with pytest.raises(errors.NotFound, match="reserve it first"):
        await publish(bench, 5, 1)
    # Above every reserved number: Redis forgot the reservation, the router restates what engines hold.
    await publish(bench, 40, 1)
    assert await newest(bench) == (40, 1)
    assert await reserve(bench, 2, 1) == 41
    with pytest.raises(errors.NotFound):
        await bench.ledger.versions.get(bench.run_id, version=99)


async def test_before_the_first_publication_there_is_no_newest(make_bench) -> None:
    async with make_bench(started=False) as bench:
        with pytest.raises(errors.NotFound, match="first publication"):
            await bench.ledger.versions.get(bench.run_id)


async def test_watchers_get_the_newest_now_and_each_publication(bench) -> None:
    seen: list[int] = []
    first = asyncio.Event()

    async def watch() -> None:
        async for version in bench.ledger.versions.watch(bench.run_id, max_wait_s=60):
            seen.append(version.label)
            first.set()
            if version.label == 2:
                return

    task = asyncio.create_task(watch())
    await asyncio.wait_for(first.wait(), 30)
    await bench.publish(2)
    await asyncio.wait_for(task, 30)
    assert seen == [0, 2]


async def test_a_quiet_watch_ends(bench) -> None:
    found = bench.ledger.versions.watch(bench.run_id, after_version=1, max_wait_s=0.01)
    assert [v async for v in found] == []


async def test_one_router_holds_the_lease(bench) -> None:
    lease = bench.ledger.versions.lease_router
    first = await lease(bench.run_id, router_id="r1", ttl_s=5)
    assert await lease(bench.run_id, router_id="r1", ttl_s=5) == first
    assert await lease(bench.run_id, router_id="r1", router_term=first, ttl_s=5) == first
    with pytest.raises(errors.FailedPrecondition) as caught:
        await lease(bench.run_id, router_id="r2", ttl_s=5)
    assert (caught.value.reason, caught.value.metadata["holder"]) == ("ROUTER_HELD", "r1")
    assert caught.value.retry_after_s == 5.0
    bench.clock.advance(5)
    second = await lease(bench.run_id, router_id="r2", ttl_s=5)
    assert second > first
    with pytest.raises(errors.StaleTerm):
        await lease(bench.run_id, router_id="r1", router_term=first, ttl_s=5)
