"""Sources, credits, leases and seals: each rule of LEDGER's section on prompts."""

from __future__ import annotations

import pytest

from milepost import errors
from milepost import types as t


async def put(bench, prompts, **options):
    return await bench.ledger.prompts.put(bench.run_id, prompts=prompts, **options)


async def test_a_batch_is_accepted_as_a_prefix_with_the_cursor_of_its_last_item(bench, make_prompt) -> None:
    await bench.ledger.prompts.open_source(bench.run_id, source_id="s", digest="d")
    batch = [make_prompt(f"a{i}", cursor=f"line {i}") for i in range(10)]
    result = await put(bench, batch, source_id="s")
    assert (result.accepted, result.duplicates, result.credits) == (6, 0, 0)  # (1 + 2) * 2 may wait
    assert result.cursor == "line 5"
    assert (await bench.ledger.prompts.open_source(bench.run_id, source_id="s")).cursor == "line 5"


async def test_no_credit_is_an_error_that_says_when_to_come_back(bench, make_prompt) -> None:
    await bench.put(6)
    with pytest.raises(errors.ResourceExhausted) as caught:
        await put(bench, [make_prompt("z")])
    assert caught.value.reason == "NO_CREDITS"
    assert caught.value.retry_after_s


async def test_a_known_prompt_costs_no_credit_and_other_content_is_refused(bench, make_prompt) -> None:
    await put(bench, [make_prompt(f"a{i}") for i in range(6)])
    again = await put(bench, [make_prompt("a0"), make_prompt("a1"), make_prompt("new")])
    assert (again.accepted, again.duplicates) == (2, 2)
    with pytest.raises(errors.AlreadyExists, match="a0"):
        await put(bench, [make_prompt("a0", content="something else")])
    # Behind other items it only ends the prefix: what stands before it is not refused with it.
    mixed = await put(bench, [make_prompt("a1"), make_prompt("a0", content="other")])
    assert mixed.accepted == 1


async def test_the_cursor_is_compared_and_set(bench, make_prompt) -> None:
    await bench.ledger.prompts.open_source(bench.run_id, source_id="s")
    first = [make_prompt("a0", cursor="1"), make_prompt("a1", cursor="2")]
    await put(bench, first, source_id="s")
    with pytest.raises(errors.FailedPrecondition) as caught:
        await put(bench, [make_prompt("b", cursor="9")], source_id="s", expected_cursor="1")
    assert caught.value.metadata["stored"] == "2"
    assert caught.value.metadata["expected"] == "1"


async def test_a_repeated_put_whose_answer_was_lost_is_no_error(bench, make_prompt) -> None:
    await bench.ledger.prompts.open_source(bench.run_id, source_id="s")
    batch = [make_prompt(f"a{i}", cursor=str(i + 1)) for i in range(3)]
    await put(bench, batch, source_id="s", expected_cursor="")
    again = await put(bench, [*batch, make_prompt("a3", cursor="4")], source_id="s", expected_cursor="")
    assert (again.accepted, again.duplicates, again.cursor) == (4, 3, "4")


async def test_a_source_opened_with_another_digest_is_refused(bench) -> None:
    await bench.ledger.prompts.open_source(bench.run_id, source_id="s", digest="one")
    with pytest.raises(errors.FailedPrecondition, match="two"):
        await bench.ledger.prompts.open_source(bench.run_id, source_id="s", digest="two")


async def test_a_source_must_be_open_to_be_put_to(bench, make_prompt) -> None:
    with pytest.raises(errors.NotFound, match="OpenSource"):
        await put(bench, [make_prompt("a")], source_id="s")
    await bench.ledger.prompts.open_source(bench.run_id, source_id="s")
    assert await bench.ledger.prompts.close_source(bench.run_id, source_id="s") == 0
    assert await bench.ledger.prompts.close_source(bench.run_id, source_id="s") == 0
    assert (await bench.ledger.prompts.open_source(bench.run_id, source_id="s")).closed
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        await put(bench, [make_prompt("a")], source_id="s")


async def test_open_sources_share_the_credits(bench, make_prompt) -> None:
    for name in ("s1", "s2"):
        await bench.ledger.prompts.open_source(bench.run_id, source_id=name)
    greedy = await put(bench, [make_prompt(f"g{i}") for i in range(9)], source_id="s1")
    assert greedy.accepted == 3
    other = await put(bench, [make_prompt(f"o{i}") for i in range(9)], source_id="s2")
    assert other.accepted == 3
    await bench.ledger.prompts.close_source(bench.run_id, source_id="s2")
    await bench.lease(2)
    assert (await bench.ledger.prompts.open_source(bench.run_id, source_id="s1")).credits == 2


async def test_prompts_are_refused_when_payloads_hold_four_fifths_of_their_limit(
    make_bench, make_prompt
) -> None:
    async with make_bench(max_group_bytes=1000, max_payload_bytes=4000) as bench:
        await bench.put(4)
        assert await bench.seal(await bench.lease(4), size=900) == [t.SealStatus.SEALED] * 4
        with pytest.raises(errors.ResourceExhausted) as caught:
            await put(bench, [make_prompt("late")])
        assert caught.value.reason == "NO_BYTES"


async def test_leases_carry_version_label_and_a_growing_attempt(bench) -> None:
    await bench.put(1)
    found = await bench.ledger.prompts.lease(bench.run_id, gateway_id="g", instance_id="g1", max_prompts=4)
    assert [(x.prompt_id, x.attempt, x.content) for x in found.leases] == [("p000", 1, b"p000")]
    assert (found.min_version, found.label, found.num_samples, found.ttl_s) == (1, 0, 2, 10.0)
    assert found.reason == "no prompts"
    bench.clock.advance(10)
    assert [x.attempt for x in await bench.lease(4)] == [2]


async def test_nothing_is_admitted_before_the_first_publication(make_bench) -> None:
    async with make_bench(started=False) as bench:
        await bench.put(2)
        found = await bench.ledger.prompts.lease(
            bench.run_id, gateway_id="g", instance_id="g1", max_prompts=4
        )
        assert (found.leases, found.reason) == ((), "no weights published")


async def test_renewed_leases_last_and_others_are_reported_lost(bench) -> None:
    await bench.put(3)
    a, b, c = await bench.lease(3)
    keys = [t.LeaseKey(prompt_id=x.prompt_id, attempt=x.attempt) for x in (a, b, c)]
    bench.clock.advance(6)
    renewed = await bench.ledger.prompts.renew(bench.run_id, instance_id="gw-1", leases=keys[:2])
    assert (renewed.lost, renewed.ttl_s) == ((), 10.0)
    bench.clock.advance(6)
    await bench.stats()  # reaps c
    await bench.seal([b])
    renewed = await bench.ledger.prompts.renew(bench.run_id, instance_id="gw-1", leases=keys)
    assert renewed.lost == (keys[1], keys[2])
    stranger = await bench.ledger.prompts.renew(bench.run_id, instance_id="gw-9", leases=keys[:1])
    assert stranger.lost == (keys[0],)


async def test_a_renewal_that_names_all_is_told_of_the_others(bench) -> None:
    await bench.put(4)
    leases = await bench.lease(3)
    keys = [t.LeaseKey(prompt_id=x.prompt_id, attempt=x.attempt) for x in leases]
    await bench.lease(1, instance="gw-2", gateway="other")
    renew = bench.ledger.prompts.renew
    told = await renew(bench.run_id, instance_id="gw-1", leases=keys[:1], names_all=True)
    assert set(told.unnamed) == set(keys[1:]), "of this instance, and no other's"
    assert (await renew(bench.run_id, instance_id="gw-1", leases=keys[:1])).unnamed == ()
    bench.clock.advance(6)
    await renew(bench.run_id, instance_id="gw-1", leases=keys[:1], names_all=True)
    bench.clock.advance(6)
    await bench.stats()  # the unnamed are not extended: reaped, and leased again
    again = [t.LeaseKey(prompt_id=x.prompt_id, attempt=x.attempt) for x in await bench.lease(2)]
    assert {(x.prompt_id, x.attempt) for x in again} == {(x.prompt_id, 2) for x in keys[1:]}
    told = await renew(bench.run_id, instance_id="gw-1", leases=keys, names_all=True)
    assert set(told.lost) == set(keys[1:]), "an older attempt names no newer one"
    assert set(told.unnamed) == set(again)
    assert set((await renew(bench.run_id, instance_id="gw-1", leases=(), names_all=True)).unnamed) == {
        keys[0],
        *again,
    }
    with pytest.raises(errors.InvalidArgument, match="leases: 0 given"):
        await renew(bench.run_id, instance_id="gw-1", leases=())


async def test_a_restarted_gateway_frees_the_leases_of_its_former_instance(bench) -> None:
    await bench.put(4)
    await bench.lease(4, instance="gw-1")
    again = await bench.lease(4, instance="gw-2")
    assert [(x.prompt_id, x.attempt) for x in again] == [(f"p{i:03d}", 2) for i in range(4)]
    with pytest.raises(errors.FailedPrecondition, match="gw-1"):
        await bench.lease(1, instance="gw-1")
    assert (await bench.row("p000")).failed_attempts == 0


async def test_max_attempts_expired_leases_drop_the_prompt(make_bench) -> None:
    async with make_bench(max_attempts=3) as bench:
        await bench.put(1)
        for attempt in (1, 2, 3):
            assert [x.attempt for x in await bench.lease(1)] == [attempt]
            bench.clock.advance(10)
        stats = await bench.stats()
        assert (stats.dropped, stats.expired_leases) == ({"attempts": 1}, 3)
        await bench.audit()


async def test_released_prompts_go_to_the_front_and_failures_count(make_bench) -> None:
    async with make_bench(max_attempts=2) as bench:
        await bench.put(3)
        first, second = await bench.lease(2)
        key = t.LeaseKey(prompt_id=first.prompt_id, attempt=first.attempt)
        release = bench.ledger.prompts.release
        result = await release(bench.run_id, instance_id="gw-1", leases=[key])
        assert (result.released, result.dropped) == (1, 0)
        assert (await release(bench.run_id, instance_id="gw-1", leases=[key])).released == 0
        again = (await bench.lease(1))[0]
        assert (again.prompt_id, again.attempt) == (first.prompt_id, 2)
        for attempt, dropped in ((2, 0), (3, 1)):
            key = t.LeaseKey(prompt_id=first.prompt_id, attempt=attempt)
            result = await release(
                bench.run_id,
                instance_id="gw-1",
                leases=[key],
                failed=True,
                exhausted_reason=t.DropReason.REWARD_ERROR,
                detail="it raised",
            )
            assert result.dropped == dropped
            await bench.lease(1)
        row = await bench.row(first.prompt_id)
        assert (row.drop_reason, row.detail) == (t.DropReason.REWARD_ERROR, "it raised")
        result = await release(
            bench.run_id,
            instance_id="gw-1",
            leases=[t.LeaseKey(prompt_id=second.prompt_id, attempt=1)],
            drop_reason=t.DropReason.INVALID,
        )
        assert result.dropped == 1
        assert (await bench.stats()).dropped == {"reward_error": 1, "invalid": 1}


async def test_outcomes_of_seals(bench, make_group) -> None:
    await bench.put(2)
    lease, other = await bench.lease(2)
    seal = bench.ledger.prompts.seal

    async def status(*groups: t.Group) -> list[t.SealStatus]:
        return [r.status for r in await seal(bench.run_id, groups=groups)]

    good = make_group(lease.prompt_id, 1)
    assert await status(good, good) == [t.SealStatus.SEALED, t.SealStatus.DUPLICATE]
    assert await status(make_group(lease.prompt_id, 1, salt="x")) == [t.SealStatus.CONFLICT]
    assert await status(make_group(lease.prompt_id, 2)) == [t.SealStatus.LEASE_LOST]
    assert await status(make_group("nobody", 1)) == [t.SealStatus.UNKNOWN_PROMPT]
    assert await status(make_group(other.prompt_id, 1, versions=(7,))) == [t.SealStatus.UNKNOWN_VERSION]
    reserved = await bench.ledger.versions.reserve(bench.run_id, term=bench.term, step=1, attempt=1)
    assert await status(make_group(other.prompt_id, 1, versions=(reserved,))) == [
        t.SealStatus.UNKNOWN_VERSION
    ]
    short = (await seal(bench.run_id, groups=[make_group(other.prompt_id, 1, samples=1)]))[0]
    assert short.status == t.SealStatus.INVALID
    assert "samples_per_prompt = 2" in short.message
    big = (await seal(bench.run_id, groups=[make_group(other.prompt_id, 1, size=1001)]))[0]
    assert big.status == t.SealStatus.INVALID
    assert "max_group_bytes" in big.message
    failed = make_group(other.prompt_id, 1, outcomes=[t.Outcome.COMPLETED, t.Outcome.REWARD_ERROR])
    assert await status(failed) == [t.SealStatus.INVALID]
    assert await status(make_group(other.prompt_id, 1)) == [t.SealStatus.SEALED]
    await bench.audit()


async def test_failed_samples_may_be_sealed_when_the_run_masks_them(make_bench, make_group) -> None:
    async with make_bench(error_policy=t.ErrorPolicy.MASK) as bench:
        await bench.put(1)
        (lease,) = await bench.lease(1)
        failed = make_group(lease.prompt_id, 1, outcomes=[t.Outcome.ENV_ERROR, t.Outcome.COMPLETED])
        results = await bench.ledger.prompts.seal(bench.run_id, groups=[failed])
        assert [r.status for r in results] == [t.SealStatus.SEALED]


async def test_a_void_version_is_never_sealed(bench) -> None:
    await bench.put(1)
    (lease,) = await bench.lease(1)
    version = await bench.ledger.versions.reserve(bench.run_id, term=bench.term, step=1, attempt=1)
    await bench.open_term()
    assert await bench.seal([lease], versions=(1, version)) == [t.SealStatus.INVALID]


async def test_a_late_seal_is_accepted_while_nobody_took_the_prompt(bench) -> None:
    await bench.put(2)
    first, second = await bench.lease(2)
    bench.clock.advance(11)
    assert await bench.seal([first]) == [t.SealStatus.SEALED]  # expired, not reaped
    assert (await bench.stats()).waiting == 1  # reaped
    assert await bench.seal([second]) == [t.SealStatus.SEALED]
    await bench.audit()


async def test_a_late_seal_is_lost_once_its_prompt_or_its_place_was_taken(bench) -> None:
    await bench.put(6)
    old = await bench.lease(4)
    bench.clock.advance(11)
    new = await bench.lease(3, gateway="other", instance="o-1")
    assert [x.prompt_id for x in new] == [x.prompt_id for x in old[:3]]
    assert await bench.seal(old[:1]) == [t.SealStatus.LEASE_LOST]
    assert (await bench.stats()).admissible == 1
    await bench.ledger.runs.update(bench.run_id, config=t.RunConfig(max_staleness=0))
    assert await bench.seal(old[3:]) == [t.SealStatus.LEASE_LOST]
    await bench.audit()


async def test_cancelled_prompts_are_dropped_unless_they_are_in_a_step(bench) -> None:
    await bench.put(5)
    leases = await bench.lease(4)
    await bench.seal(leases[:3])
    ids = await bench.step_ids(1)
    assert ids == ["p000", "p001"]
    result = await bench.ledger.prompts.cancel(
        bench.run_id, prompt_ids=["p000", "p002", "p003", "p004", "who"]
    )
    assert result.cancelled == ("p002", "p003", "p004")
    assert result.not_cancelled == ("p000", "who")
    assert await bench.seal(leases[3:]) == [t.SealStatus.LEASE_LOST]
    assert (await bench.stats()).payload_bytes == 200
    await bench.audit()
