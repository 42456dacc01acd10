"""Admission and staleness: who may start rolling, and what a step takes."""

from __future__ import annotations

import pytest

from milepost import errors
from milepost import types as t
from milepost_buffer.prompts import Lease


async def test_the_window_holds_the_steps_after_the_published_one(bench) -> None:
    await bench.put(6)
    assert len(await bench.lease(10)) == 4  # (1 + 1) * 2
    assert (await bench.stats()).admissible == 0


async def test_a_leased_step_keeps_its_place_until_its_weights_are_published(bench) -> None:
    await bench.put(6)
    await bench.seal(await bench.lease(4))
    ids = await bench.step_ids(1)
    assert await bench.lease(4) == []
    await bench.commit(1, ids)
    assert await bench.lease(4) == []  # trained, not published
    await bench.publish(1)
    assert len(await bench.lease(4)) == 2


async def test_new_sizes_apply_to_steps_that_are_not_leased(bench) -> None:
    await bench.put(6)
    await bench.seal(await bench.lease(4))
    ids = await bench.step_ids(1)
    await bench.ledger.runs.update(bench.run_id, config=t.RunConfig(groups_per_step=3))
    # steps 1 (leased with 2) and 2 (now 3): 5 places, 2 leased and 2 ready
    assert (await bench.stats()).admissible == 1
    assert await bench.step_ids(1) == ids
    pending = (await bench.lease_step(2)).pending
    assert (pending.needed, pending.ready) == (3, 2)
    await bench.ledger.runs.update(bench.run_id, config=t.RunConfig(groups_per_step=1))
    assert len((await bench.lease_step(2)).groups) == 1


async def test_bytes_are_admitted_too(make_bench) -> None:
    async with make_bench(max_group_bytes=1000, max_payload_bytes=4000, max_staleness=3) as bench:
        await bench.put(8)
        leases = await bench.lease(8)
        assert len(leases) == 4
        await bench.seal(leases[:1], size=1000)
        assert await bench.lease(8) == []
        await bench.seal(leases[1:], size=600)
        found = await bench.ledger.prompts.lease(
            bench.run_id, gateway_id="gw", instance_id="gw-1", max_prompts=8
        )
        assert (len(found.leases), found.reason) == (1, "bytes")


async def test_a_checkpoint_is_wanted_once_payloads_pass_half_of_their_limit(make_bench) -> None:
    async with make_bench(max_group_bytes=1000, max_payload_bytes=4000) as bench:
        await bench.put(4)
        await bench.seal(await bench.lease(4), size=500)
        lease = await bench.lease_step(1)
        assert not lease.checkpoint_wanted
        await bench.put(2)
        result = await bench.commit(1, [g.prompt_id for g in lease.groups])
        assert not result.checkpoint_wanted
        await bench.publish(1)
        await bench.seal(await bench.lease(2), size=500, versions=(2,))
        lease = await bench.lease_step(2)
        assert lease.checkpoint_wanted
        assert (await bench.commit(2, [g.prompt_id for g in lease.groups])).checkpoint_wanted
        await bench.trim(1)
        assert not (await bench.lease_step(2)).checkpoint_wanted


async def test_a_step_takes_the_oldest_label_then_the_earliest_seal(bench) -> None:
    await bench.put(4)
    a, b, c, d = await bench.lease(4)
    await bench.publish(1)
    await bench.seal([c], versions=(2,))
    await bench.seal([d], versions=(1,))
    await bench.seal([b], versions=(2,))
    await bench.seal([a], versions=(1, 2))
    assert await bench.step_ids(1) == [d.prompt_id, a.prompt_id]
    assert await bench.step_ids(2) == [c.prompt_id, b.prompt_id]


async def test_a_leased_step_is_answered_as_it_was(bench) -> None:
    await bench.put(4)
    await bench.seal(await bench.lease(4))
    first = await bench.lease_step(1)
    await bench.ledger.runs.update(bench.run_id, config=t.RunConfig(max_staleness=0))
    await bench.publish(9)
    again = await bench.lease_step(1)
    assert again.repeated_lease
    assert again.groups == first.groups
    assert again.max_staleness == 1


async def test_groups_carry_the_facts_of_their_header(bench) -> None:
    await bench.put(2)
    await bench.seal(await bench.lease(2), size=300)
    group = (await bench.lease_step(1)).groups[0]
    assert (group.num_tokens, group.rewards, group.num_loss_tokens) == ((10, 10), (1.0, 0.0), 16)
    assert (group.payload_bytes, group.attempt, group.staleness) == (300, 1, 0)


async def test_steps_are_leased_in_order_and_at_most_one_ahead(bench) -> None:
    await bench.put(4)
    await bench.seal(await bench.lease(4))
    with pytest.raises(errors.FailedPrecondition, match="step = 2"):
        await bench.lease_step(2)
    await bench.step_ids(1)
    await bench.step_ids(2)
    with pytest.raises(errors.FailedPrecondition, match="two ahead"):
        await bench.lease_step(3)


async def test_too_stale_groups_are_requeued_and_that_stands(bench) -> None:
    for step in (1, 2):
        await bench.train_step(step)
    await bench.put(2)
    slow = await bench.lease(2)
    for step in (3, 4):
        await bench.train_step(step)
    await bench.put(1)
    assert await bench.seal(slow, versions=(3,)) == [t.SealStatus.SEALED] * 2
    pending = (await bench.lease_step(5)).pending  # label 2 at step 5: staleness 2
    assert (pending.ready, pending.waiting) == (0, 3)
    assert (await bench.stats()).stale_requeues == 2
    assert (await bench.stats()).payload_bytes == 8 * 100
    assert await bench.seal(slow, versions=(3,)) == [t.SealStatus.LEASE_LOST] * 2
    again = await bench.lease(1)
    assert [(x.prompt_id, x.attempt) for x in again] == [(slow[0].prompt_id, 3)]
    await bench.audit()


async def test_too_stale_groups_are_dropped_where_the_run_says_so(make_bench) -> None:
    async with make_bench(on_stale=t.OnStale.DROP, max_staleness=0) as bench:
        await bench.put(2)
        slow = await bench.lease(1)
        quick = await bench.lease(1)
        await bench.seal(quick)
        await bench.ledger.runs.update(bench.run_id, config=t.RunConfig(groups_per_step=1))
        ids = await bench.step_ids(1)
        await bench.commit(1, ids)
        await bench.publish(1)
        await bench.seal(slow)
        assert (await bench.lease_step(2)).pending
        assert (await bench.stats()).dropped == {"stale": 1}
        await bench.audit()


async def test_a_prompt_requeued_often_is_waited_for(make_bench) -> None:
    async with make_bench(groups_per_step=1, stale_attempts=1) as bench:
        await bench.put(3)
        slow, quick = await bench.lease(2)

        async def overtake(step: int, lease: Lease) -> None:
            await bench.seal([lease], versions=(bench.versions[step - 1],))
            await bench.commit(step, await bench.step_ids(step))
            assert (await bench.row(lease.prompt_id)).step == step
            await bench.publish(step)

        await overtake(1, quick)
        await overtake(2, (await bench.lease(1))[0])  # it may: the slow one was never requeued
        await bench.seal([slow])
        assert (await bench.lease_step(3)).pending
        assert (await bench.row(slow.prompt_id)).stale_count == 1
        await bench.put(2)
        slow, quick = await bench.lease(2)
        assert slow.attempt == 3
        await overtake(3, quick)  # it may: the slow one has room in step 4
        (young,) = await bench.lease(1)
        await bench.seal([young], versions=(bench.versions[3],))
        assert "waited for" in (await bench.lease_step(4)).pending.reason
        await bench.seal([slow], versions=(bench.versions[2],))
        assert await bench.step_ids(4) == [slow.prompt_id]


async def test_on_stale_wait_lets_a_younger_group_overtake_only_into_slack(make_bench) -> None:
    async with make_bench(on_stale=t.OnStale.WAIT, groups_per_step=1, max_staleness=1) as bench:
        await bench.put(3)
        slow, quick = await bench.lease(2)
        await bench.seal([quick])
        assert await bench.step_ids(1) == [quick.prompt_id]  # slow still has room in step 2
        await bench.commit(1, [quick.prompt_id])
        await bench.publish(1)
        (young,) = await bench.lease(1)
        await bench.seal([young], versions=(2,))
        assert "waited for" in (await bench.lease_step(2)).pending.reason
        await bench.seal([slow])
        assert await bench.step_ids(2) == [slow.prompt_id]


async def test_the_rest_is_trained_as_a_short_step_when_sources_close(bench) -> None:
    await bench.ledger.prompts.open_source(bench.run_id, source_id="s")
    await bench.put(3, source_id="s")
    leases = await bench.lease(3)
    await bench.seal(leases[:2])
    ids = await bench.step_ids(1)
    await bench.ledger.prompts.close_source(bench.run_id, source_id="s")
    assert (await bench.lease_step(2)).pending.rolling == 1
    await bench.seal(leases[2:])
    tail = await bench.step_ids(2)
    assert tail == [leases[2].prompt_id]
    await bench.commit(1, ids)
    assert not (await bench.ledger.runs.get(bench.run_id)).finished
    with pytest.raises(errors.OutOfRange):
        await bench.lease_step(3)
    await bench.commit(2, tail)
    assert (await bench.ledger.runs.get(bench.run_id)).finished
    await bench.audit()


async def test_the_rest_is_dropped_where_the_run_says_so(make_bench) -> None:
    async with make_bench(tail=t.Tail.DROP) as bench:
        await bench.ledger.prompts.open_source(bench.run_id, source_id="s")
        await bench.put(3, source_id="s")
        await bench.seal(await bench.lease(3))
        ids = await bench.step_ids(1)
        await bench.ledger.prompts.close_source(bench.run_id, source_id="s")
        with pytest.raises(errors.OutOfRange):
            await bench.lease_step(2)
        await bench.commit(1, ids)
        stats = await bench.stats()
        assert (stats.trained, stats.dropped, stats.payload_bytes) == (2, {"tail": 1}, 200)


async def test_without_any_source_a_run_never_ends(bench) -> None:
    assert (await bench.lease_step(1)).pending
    assert not (await bench.ledger.runs.get(bench.run_id)).finished
