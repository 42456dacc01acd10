"""Terms, commits, resumption, trimming, and what happens when Redis forgets."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from milepost import errors
from milepost import types as t
from milepost_buffer.audit import audit
from milepost_buffer.store import prefix_of


async def test_a_new_term_fences_every_mutation_of_the_old_one(bench) -> None:
    await bench.put(2)
    await bench.seal(await bench.lease(2))
    ids = await bench.step_ids(1)
    old = bench.term
    version = await bench.ledger.versions.reserve(bench.run_id, term=old, step=1, attempt=1)
    new = (await bench.ledger.steps.open_term(bench.run_id, consumer_id="trainer")).term
    assert new > old
    calls = [
        bench.lease_step(1),
        bench.commit(1, ids),
        bench.trim(0),
        bench.state(0),
        bench.ledger.versions.reserve(bench.run_id, term=old, step=1, attempt=2),
        bench.ledger.versions.publish(bench.run_id, term=old, version=version, label=1),
    ]
    for call in calls:
        with pytest.raises(errors.StaleTerm, match=str(new)):
            await call


async def test_terms_grow_with_the_clock_and_never_shrink(bench) -> None:
    first = bench.term
    assert first == bench.clock.now_ms
    bench.clock.advance(5)
    second = (await bench.ledger.steps.open_term(bench.run_id, consumer_id="trainer")).term
    assert second == bench.clock.now_ms
    bench.clock.advance(-3)
    third = (await bench.ledger.steps.open_term(bench.run_id, consumer_id="trainer")).term
    assert third == second + 1


async def test_a_term_must_state_its_checkpoint_before_it_works(bench) -> None:
    bench.term = (await bench.ledger.steps.open_term(bench.run_id, consumer_id="trainer")).term
    with pytest.raises(errors.FailedPrecondition, match="checkpoint"):
        await bench.lease_step(1)


async def test_commits_are_checked_and_may_be_repeated(bench) -> None:
    await bench.put(4)
    await bench.seal(await bench.lease(4))
    ids = await bench.step_ids(1)
    await bench.step_ids(2)
    with pytest.raises(errors.FailedPrecondition, match="order"):
        await bench.commit(1, ids[::-1])
    with pytest.raises(errors.FailedPrecondition):
        await bench.commit(1, ids[:1])
    with pytest.raises(errors.FailedPrecondition, match="in order"):
        await bench.commit(2, ["p002", "p003"])
    dropped = [t.DroppedGroup(prompt_id=ids[1], reason=t.DropReason.FILTER)]
    assert not (await bench.commit(1, ids, dropped)).repeated_commit
    assert (await bench.commit(1, ids, dropped)).repeated_commit
    with pytest.raises(errors.FailedPrecondition, match="dropped"):
        await bench.commit(1, ids)
    stats = await bench.stats()
    assert (stats.trained, stats.dropped, stats.committed_step) == (1, {"filter": 1}, 1)
    await bench.commit(2, ["p002", "p003"])
    with pytest.raises(errors.FailedPrecondition, match="never leased"):
        await bench.commit(3, ids)
    await bench.audit()


async def test_resuming_an_older_checkpoint_gives_the_same_groups_in_the_same_order(bench) -> None:
    taken = [await bench.train_step(step) for step in (1, 2, 3)]
    point = await bench.open_term(1)
    assert (point.committed_step, point.next_step) == (1, 2)
    assert (point.published_label, point.published_version) == (3, 4)
    stats = await bench.stats()
    assert (stats.trained, stats.assigned) == (2, 4)
    for step in (2, 3):
        lease = await bench.lease_step(step)
        assert lease.repeated_lease
        assert [g.prompt_id for g in lease.groups] == taken[step - 1]
        assert lease.published_label == 3
        await bench.commit(step, taken[step - 1])
    await bench.audit()


async def test_groups_dropped_at_a_commit_come_back_with_their_step(bench) -> None:
    await bench.put(2)
    await bench.seal(await bench.lease(2))
    ids = await bench.step_ids(1)
    await bench.commit(1, ids, [t.DroppedGroup(prompt_id=ids[0], reason=t.DropReason.FILTER)])
    await bench.open_term(0)
    assert (await bench.stats()).dropped == {}
    assert await bench.step_ids(1) == ids
    await bench.commit(1, ids)
    assert (await bench.stats()).trained == 2
    await bench.audit()


async def test_replay_is_not_counted_by_admission(bench) -> None:
    for step in (1, 2, 3):
        await bench.train_step(step)
    before = (await bench.stats()).admissible
    await bench.open_term(0)
    assert (await bench.stats()).admissible == before == 4


async def test_a_repeated_statement_never_rewinds_what_was_committed_since(bench) -> None:
    await bench.train_step(1)
    await bench.open_term(0)
    ids = await bench.step_ids(1)
    await bench.commit(1, ids)
    point = await bench.state(0)
    assert (point.committed_step, point.next_step) == (1, 2)


async def test_trim_frees_payloads_and_is_cumulative(bench) -> None:
    taken = [await bench.train_step(step) for step in (1, 2, 3)]
    result = await bench.trim(2)
    assert (result.trimmed_step, result.freed) == (2, 4)
    assert (await bench.trim(1)).trimmed_step == 2
    assert (await bench.stats()).payload_bytes == 200
    with pytest.raises(errors.FailedPrecondition, match="committed"):
        await bench.trim(4)
    with pytest.raises(errors.NotFound):
        [x async for x in bench.ledger.steps.payloads(bench.run_id, prompt_ids=taken[0])]
    kept = [x async for x in bench.ledger.steps.payloads(bench.run_id, prompt_ids=taken[2])]
    assert [name for name, _ in kept] == taken[2]
    assert (await bench.row(taken[0][0])).state == t.PromptState.TRAINED
    await bench.audit()


async def test_a_checkpoint_before_the_trimmed_step_is_data_loss(bench) -> None:
    for step in (1, 2, 3):
        await bench.train_step(step)
    await bench.trim(2)
    with pytest.raises(errors.DataLoss, match="on_gap"):
        await bench.open_term(1)
    assert (await bench.stats()).committed_step == 3  # refused as a whole


async def test_a_gap_is_rolled_out_again_where_asked_for(bench) -> None:
    taken = [await bench.train_step(step) for step in (1, 2, 3)]
    await bench.trim(2)
    point = await bench.open_term(1, on_gap=t.OnGap.REGENERATE)
    assert (point.next_step, point.trimmed_step) == (2, 1)
    stats = await bench.stats()
    assert (stats.trained, stats.assigned, stats.waiting) == (2, 2, 2)
    leases = await bench.lease(8)
    assert [x.prompt_id for x in leases] == taken[1]
    await bench.seal(leases, versions=(4,))
    again = await bench.lease_step(2)
    assert sorted(g.prompt_id for g in again.groups) == sorted(taken[1])
    assert {g.staleness for g in again.groups} == {0}
    await bench.commit(2, [g.prompt_id for g in again.groups])
    assert await bench.step_ids(3) == taken[2]
    await bench.audit()


async def test_a_gap_below_the_published_label_has_room_of_its_own(make_bench) -> None:
    async with make_bench(max_staleness=0) as bench:
        for step in (1, 2, 3):
            await bench.train_step(step)
        await bench.put(2)
        await bench.seal(await bench.lease(2), versions=(4,))
        await bench.step_ids(4)  # the window of label 3 is taken
        await bench.trim(2)
        await bench.open_term(1, on_gap=t.OnGap.REGENERATE)
        assert (await bench.stats()).leased_step == 4
        leases = await bench.lease(8)
        assert len(leases) == 2
        await bench.seal(leases, versions=(4,))
        await bench.commit(2, await bench.step_ids(2))
        await bench.audit()


async def test_steps_behind_a_gap_take_no_room_from_it(bench) -> None:
    """Checkpoints and engines are lost: the run starts again at label 0, before a gap and many kept steps."""
    taken = [await bench.train_step(step) for step in range(1, 8)]
    await bench.trim(3)  # steps 4 to 7 are kept: more groups than the window of any label holds
    await bench.open_term(0, on_gap=t.OnGap.REGENERATE)
    version = await bench.ledger.versions.reserve(bench.run_id, term=bench.term, step=0, attempt=2)
    await bench.ledger.versions.publish(
        bench.run_id, term=bench.term, version=version, label=0, allow_older_label=True
    )
    assert (await bench.stats()).admissible == 4
    for step in (1, 2, 3):
        leases = await bench.lease(2)
        assert len(leases) == 2, f"nothing may roll for step {step}: the gap stays open for ever"
        await bench.seal(leases, versions=(version,))
        await bench.commit(step, await bench.step_ids(step))
        version = await bench.ledger.versions.reserve(bench.run_id, term=bench.term, step=step, attempt=2)
        await bench.ledger.versions.publish(
            bench.run_id, term=bench.term, version=version, label=step, allow_older_label=True
        )
    assert [await bench.step_ids(step) for step in (4, 5)] == taken[3:5]
    assert (await bench.stats()).admissible == 0, "all that label 3 may be taken for is leased"
    await bench.audit()


async def test_a_gap_may_be_dropped(bench) -> None:
    for step in (1, 2, 3):
        await bench.train_step(step)
    await bench.trim(2)
    await bench.open_term(1, on_gap=t.OnGap.DROP)
    assert (await bench.stats()).dropped == {"gap": 2}
    await bench.put(2)
    await bench.seal(await bench.lease(4), versions=(4,))
    await bench.commit(2, await bench.step_ids(2))
    await bench.audit()


@pytest.mark.parametrize("rolled_again", [0, 1], ids=["nothing is left", "a tail is left"])
async def test_kept_steps_close_a_gap_that_nothing_fills_any_more(bench, rolled_again: int) -> None:
    """Without it the run would be over while groups stand in a step that nobody comes to."""
    taken = [await bench.train_step(step) for step in range(1, 6)]
    await bench.trim(2)
    await bench.open_term(0, on_gap=t.OnGap.DROP)
    if rolled_again:
        await bench.put(rolled_again)
        await bench.seal(await bench.lease(4), versions=(6,))
    await bench.ledger.prompts.open_source(bench.run_id, source_id="end")
    await bench.ledger.prompts.close_source(bench.run_id, source_id="end")
    if rolled_again:
        await bench.commit(1, await bench.step_ids(1))
    first = 1 + rolled_again
    for step, ids in enumerate(taken[2:], start=first):
        assert await bench.step_ids(step) == ids
        assert await bench.step_ids(step) == ids, "asked again, the same"
        await bench.audit()
        await bench.commit(step, ids)
    with pytest.raises(errors.OutOfRange, match="finished"):
        await bench.lease_step(first + 3)
    await bench.audit()
    stats = await bench.stats()
    assert (stats.committed_step, stats.dropped) == (first + 2, {"gap": 4})


async def test_a_step_resumed_three_times_without_a_commit_is_named(bench) -> None:
    await bench.train_step(1)
    await bench.put(2)
    await bench.seal(await bench.lease(2), versions=(2,))
    ids = await bench.step_ids(2)
    assert (await bench.open_term(1)).poison_step == 0
    assert (await bench.open_term(1)).poison_step == 0
    assert (await bench.state(1)).poison_step == 0  # the same term again is no further death
    assert (await bench.open_term(1)).poison_step == 2
    poison = [t.DroppedGroup(prompt_id=i, reason=t.DropReason.POISON) for i in ids]
    await bench.commit(2, ids, poison)
    assert (await bench.stats()).dropped == {"poison": 2}
    assert (await bench.open_term(1)).poison_step == 0


# ------------------------------------------------------------------------------------------ Redis forgets


class Past:
    """The run's keys at one instant, to be put back: what a failover to a lagging replica does."""

    def __init__(self, bench) -> None:
        self._client: Redis = bench.ledger.link.client
        self._pattern = prefix_of(bench.run_id).replace("[", "\\[") + "*"
        self._dumps: dict[bytes, bytes] = {}

    async def remember(self) -> None:
        self._dumps = {
            key: await self._client.dump(key) async for key in self._client.scan_iter(match=self._pattern)
        }

    async def come_back(self) -> None:
        async for key in self._client.scan_iter(match=self._pattern):
            await self._client.delete(key)
        for key, dump in self._dumps.items():
            await self._client.restore(key, 0, dump)


def manifest(taken: list[list[str]], first: int = 1) -> list[t.StepManifest]:
    return [t.StepManifest(step=first + i, prompt_ids=tuple(ids)) for i, ids in enumerate(taken)]


async def test_a_trainer_restates_the_commits_that_redis_forgot(bench, make_prompt) -> None:
    taken = [await bench.train_step(1)]
    past = Past(bench)
    await past.remember()
    bench.clock.advance(60)
    await bench.open_term(1)
    taken += [await bench.train_step(step) for step in (2, 3)]
    await past.come_back()

    with pytest.raises(errors.FailedPrecondition) as caught:
        await bench.lease_step(4)
    assert caught.value.reason == "UNKNOWN_TERM"
    with pytest.raises(errors.DataLoss, match="step 2"):
        await bench.state(3)
    point = await bench.state(3, manifest=manifest(taken))
    assert (point.term, point.committed_step, point.next_step) == (bench.term, 3, 4)
    rows = [await bench.row(name) for name in taken[2]]
    assert [(r.state, r.step, r.position, r.tombstone) for r in rows] == [
        (t.PromptState.TRAINED, 3, 0, True),
        (t.PromptState.TRAINED, 3, 1, True),
    ]
    await bench.audit()
    report = await audit(
        bench.ledger.accounts, bench.run_id, witnesses=[t.Witness(name="steps", steps=tuple(manifest(taken)))]
    )
    assert report.closes, report.problems

    # A feeder reads its old cursor and puts the forgotten prompts again: they are known.
    await bench.publish(3, attempt=2)
    forgotten = [make_prompt(name) for name in taken[2]]
    again = await bench.ledger.prompts.put(bench.run_id, prompts=forgotten)
    assert again.duplicates == 2
    await bench.put(2)
    assert not {x.prompt_id for x in await bench.lease(4)} & {n for ids in taken for n in ids}
    with pytest.raises(errors.DataLoss):
        await bench.open_term(1)  # the tombstones have no payload
    await bench.open_term(2, on_gap=t.OnGap.REGENERATE)
    assert (await bench.stats()).dropped == {"gap": 2}  # nor a prompt to roll out again
    await bench.audit()


async def lease_inline(bench, step: int, *, inline_bytes: int) -> t.StepLease:
    return await bench.ledger.steps.lease(
        bench.run_id, consumer_id="trainer", term=bench.term, step=step, inline_bytes=inline_bytes
    )


async def test_as_many_payloads_as_fit_come_along_with_a_lease_and_with_its_repetition(bench) -> None:
    await bench.put(2)
    await bench.seal(await bench.lease(2), size=100)
    first = await lease_inline(bench, 1, inline_bytes=200)
    stored = [p async for p in bench.ledger.steps.payloads(bench.run_id, prompt_ids=["p000", "p001"])]
    assert [(g.prompt_id, p) for g, p in zip(first.groups, first.payloads, strict=True)] == stored
    await bench.open_term()
    again = await lease_inline(bench, 1, inline_bytes=199)
    assert again.repeated_lease
    assert (again.groups, again.payloads) == (first.groups, first.payloads[:1])
    assert (await lease_inline(bench, 1, inline_bytes=99)).payloads == ()
    assert (await bench.lease_step(1)).payloads == ()


async def test_a_payload_that_is_gone_ends_those_that_come_along(bench) -> None:
    ids = await bench.train_step(1)
    await bench.ledger.store.command("DEL", f"{prefix_of(bench.run_id)}g:{ids[1]}")
    lease = await lease_inline(bench, 1, inline_bytes=1 << 20)
    assert [g.prompt_id for g in lease.groups] == ids
    assert len(lease.payloads) == 1


async def test_a_fenced_consumer_gets_no_payloads(bench) -> None:
    await bench.train_step(1)
    older = bench.term
    await bench.open_term()
    with pytest.raises(errors.StaleTerm):
        await bench.ledger.steps.lease(
            bench.run_id, consumer_id="trainer", term=older, step=1, inline_bytes=1 << 20
        )


async def test_a_forgotten_commit_of_a_known_step_is_restated_with_its_payloads(bench) -> None:
    await bench.put(4)
    await bench.seal(await bench.lease(4))
    first = await bench.step_ids(1)
    past = Past(bench)
    await past.remember()
    await bench.commit(1, first)
    second = await bench.step_ids(2)
    await bench.commit(2, second)
    await past.come_back()
    point = await bench.state(2, manifest=manifest([first, second]))
    assert (point.committed_step, point.next_step) == (2, 3)
    stats = await bench.stats()
    assert (stats.trained, stats.ready, stats.payload_bytes) == (4, 0, 400)
    await bench.open_term(0)
    assert [await bench.step_ids(s) for s in (1, 2)] == [first, second]
    await bench.audit()


async def test_a_manifest_moves_groups_to_the_steps_it_names(bench) -> None:
    await bench.put(4)
    leases = await bench.lease(4)
    await bench.seal(leases)
    a, b, c, d = (x.prompt_id for x in leases)
    assert await bench.step_ids(1) == [a, b]
    assert await bench.step_ids(2) == [c, d]
    await bench.state(2, manifest=manifest([[c, a], [b, "gone"]]))
    assert (await bench.row(c)).step == 1
    assert (await bench.row(b)).step == 2
    assert (await bench.row(d)).state == t.PromptState.READY
    assert (await bench.row("gone")).tombstone
    await bench.audit()


async def test_a_manifest_outweighs_a_drop(bench) -> None:
    await bench.put(2)
    await bench.ledger.prompts.cancel(bench.run_id, prompt_ids=["p000"])
    dropped = (t.DroppedGroup(prompt_id="p001", reason=t.DropReason.FILTER),)
    step = t.StepManifest(step=1, prompt_ids=("p000", "p001"), dropped=dropped)
    await bench.state(1, manifest=[step])
    rows = [await bench.row(name) for name in step.prompt_ids]
    assert [(r.state.name, r.drop_reason.name) for r in rows] == [
        ("TRAINED", "UNSPECIFIED"),
        ("DROPPED", "FILTER"),
    ]
    assert (await bench.stats()).dropped == {"filter": 1}
    await bench.audit()


async def test_a_manifest_of_another_history_is_refused(bench) -> None:
    taken = [await bench.train_step(1)]
    with pytest.raises(errors.FailedPrecondition) as caught:
        await bench.open_term(1, manifest=manifest([taken[0][::-1]]))
    assert caught.value.reason == "MANIFEST_MISMATCH"
    with pytest.raises(errors.FailedPrecondition, match="step 2"):
        await bench.open_term(2, manifest=manifest([taken[0], [taken[0][0], "x"]]))
    with pytest.raises(errors.FailedPrecondition, match="step 3"):
        await bench.open_term(3, manifest=manifest([taken[0], ["y"], ["y"]]))
    await bench.audit()


async def test_witnesses_find_what_redis_alone_cannot(bench) -> None:
    past = Past(bench)
    await past.remember()
    ids = await bench.train_step(1)
    await past.come_back()
    await bench.audit()  # a consistent past
    witness = t.Witness(
        name="steps.jsonl", steps=tuple(manifest([ids])), accepted_prompt_ids=tuple(ids), weight_version=2
    )
    report = await audit(bench.ledger.accounts, bench.run_id, witnesses=[witness])
    assert report.lost == 4  # two as trained, two as accepted
    assert any("weight version 2" in p for p in report.problems)
    assert not report.closes


async def test_witnesses_agree_with_a_ledger_that_forgot_nothing(bench) -> None:
    taken = [await bench.train_step(step) for step in (1, 2)]
    await bench.open_term(1)  # step 2 is ASSIGNED again: known, not lost
    accepted = tuple(name for ids in taken for name in ids)
    witness = t.Witness(
        name="w", steps=tuple(manifest(taken)), accepted_prompt_ids=accepted, weight_version=3
    )
    report = await audit(bench.ledger.accounts, bench.run_id, witnesses=[witness])
    assert report.closes, report.problems
    twice = t.Witness(name="w", steps=tuple(manifest([taken[0], taken[0]])))
    assert (await audit(bench.ledger.accounts, bench.run_id, witnesses=[twice])).twice == 2


async def test_the_audit_sees_damage(bench) -> None:
    ids = await bench.train_step(1)
    prefix = prefix_of(bench.run_id)
    await bench.ledger.link.client.delete(f"{prefix}g:{ids[0]}")
    await bench.ledger.link.client.rpush(f"{prefix}ids:1", ids[0])
    report = (await bench.ledger.accounts.own_audit(bench.run_id)).report
    assert report.twice == 1
    assert any("payload" in p for p in report.problems)
    assert any("leased with" in p for p in report.problems)


async def test_an_audit_goes_in_pages_while_the_run_goes_on(bench, monkeypatch) -> None:
    monkeypatch.setattr("milepost_buffer.accounts.AUDIT_PAGE", 1)
    calls: list[str] = []
    store = bench.ledger.store
    plain = store.call

    async def call(run_id, command, *args):
        reply = await plain(run_id, command, *args)
        calls.append(command)
        if command == "audit_rows" and calls.count(command) in (1, 3, 5):
            monkeypatch.setattr(store, "call", plain)
            await bench.train_step(2 + calls.count(command) // 2)
            monkeypatch.setattr(store, "call", call)
        return reply

    await bench.train_step(1)
    monkeypatch.setattr(store, "call", call)
    report = await bench.audit()
    assert (report.accepted, report.trained, report.in_flight) == (8, 8, 0)
    assert calls.count("audit_rows") == 9  # one row each, and the sums
    assert calls.count("audit_steps") == 8
    raw = await bench.ledger.link.client.hexists(f"{prefix_of(bench.run_id)}run", "audit")
    assert not raw


async def test_one_audit_at_a_time_and_one_that_died_holds_nobody(bench) -> None:
    await bench.train_step(1)
    store = bench.ledger.store
    await store.call(bench.run_id, "audit_rows", "dead", 1, 1)
    with pytest.raises(errors.Unavailable, match="another audit of it is under way; ask again"):
        await bench.audit()
    bench.clock.advance(11.0)
    await bench.audit()
    with pytest.raises(errors.Unavailable, match="another audit has begun"):
        await store.call(bench.run_id, "audit_rows", "dead", 0, 1)


@pytest.mark.parametrize("counter", ["trained", "dropped:6", "payload_bytes"])
async def test_the_audit_sees_a_sum_that_is_off(bench, counter) -> None:
    await bench.train_step(1)
    await bench.ledger.link.client.hincrby(f"{prefix_of(bench.run_id)}run", counter, 1)
    report = (await bench.ledger.accounts.own_audit(bench.run_id)).report
    assert any(counter in p for p in report.problems), report.problems
