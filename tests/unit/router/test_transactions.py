"""The weight transaction over engines that fail at each step of it."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from loop_clock import skip
from milepost import errors
from milepost import types as t
from milepost.types import Transport
from milepost_router import transactions
from milepost_router.transaction import Phase

OPENING = ["weights_checker", "pause_generation", "update_weight_version", "begin_weight_update"]
FAULTS = ["break_down", "hang", "hang_up"]


def faults_of(*steps: str):
    """Each step with each fault that its caller can notice."""
    silent = ("pause_generation", "begin_weight_update", "end_weight_update", "continue_generation")
    plain = [(step, fault) for step in steps for fault in FAULTS]
    return plain + [(step, "talk_rubbish") for step in steps if step not in silent]


def take_part(bench, prepared):
    return bench.transactions.find(prepared.transaction_id)


async def serve_first_version(bench, tools):
    """Brings both engines to version 1."""
    prepared = await bench.transactions.prepare(tools.request())
    await tools.transfer(bench, prepared)
    await tools.commit(bench, prepared)
    assert bench.states() == {"a": "SERVING", "b": "SERVING"}
    for fake in bench.engines.values():
        fake.calls.clear()
        fake.bodies.clear()
    return prepared


async def test_the_calls_to_an_engine_come_in_order_and_never_flush_or_abort(bench, tools):
    prepared = await bench.transactions.prepare(tools.request())
    assert bench.states() == {"a": "STALE", "b": "STALE"}, "members serve on until the first bucket"
    assert [m.engine_id for m in prepared.members] == ["a", "b"]
    acks = await tools.transfer(bench, prepared)
    assert bench.states() == {"a": "UPDATING", "b": "UPDATING"}
    committed = await tools.commit(bench, prepared)
    assert all(a.ok for ack in acks for a in ack.acks)
    assert committed == t.Committed(
        version=1, serving=("a", "b"), checksums={"a": "same", "b": "same"}, published=True
    )
    fake = bench.engines["a"]
    assert fake.calls == [
        *OPENING,
        "update_weights_from_tensor",
        "update_weights_from_tensor",
        "end_weight_update",
        "weights_checker",
        "update_weight_version",
        "flush_cache",
        "continue_generation",
    ]
    assert fake.bodies["pause_generation"] == [{"mode": "retract"}]
    for body in fake.bodies["update_weights_from_tensor"]:
        assert (body["flush_cache"], body["abort_all_requests"]) == (False, False)
        assert body["load_format"] == "flattened_bucket"
        assert "weight_version" not in body
    names = [b["new_version"] for b in fake.bodies["update_weight_version"]]
    assert names == [f"updating/{prepared.transaction_id}", "run/1/0"]
    assert all(b["abort_all_requests"] is False for b in fake.bodies["update_weight_version"])
    [published] = bench.ledger.published
    assert (published.version, published.label, published.members) == (1, 0, ("a", "b"))
    assert not fake.paused


@pytest.mark.parametrize("spans", [True, False])
async def test_an_engine_that_counts_tokens_by_its_string_gets_the_mark_after_its_last_token(
    spans: bool, tools, fake_engine
):
    bench = tools.bench()
    bench.join(await fake_engine("a"), version_spans=spans)
    prepared = await bench.transactions.prepare(tools.request())
    await tools.transfer(bench, prepared)
    pause, mark = (bench.engines["a"].calls.index(call) for call in OPENING[1:3])
    assert (pause < mark) == spans
    await tools.commit(bench, prepared)
    assert not bench.engines["a"].paused


async def test_admin_calls_carry_the_key_of_the_engine(bench, tools):
    bench.record("a").admin_api_key = "secret"
    prepared = await bench.transactions.prepare(tools.request())
    await tools.transfer(bench, prepared)
    await tools.commit(bench, prepared)
    assert bench.engines["a"].keys == {"Bearer secret"}
    assert bench.engines["b"].keys == {None}
    assert "secret" not in repr(bench.record("a"))


async def test_the_number_is_above_every_number_that_an_engine_carries(bench, tools):
    record = bench.record("b")
    bench.fleet.probe_ok(record, "run/41/3", generation=record.generation, now=0.0)
    prepared = await bench.transactions.prepare(tools.request())
    assert prepared.version == 42


async def test_a_release_without_sessions_is_asked_for_none(bench, tools, fake_engine):
    fake = await fake_engine("c")
    bench.join(fake, update_session=False, checksum=False)
    prepared = await bench.transactions.prepare(tools.request(engine_ids=("c",)))
    await tools.transfer(bench, prepared)
    committed = await tools.commit(bench, prepared)
    assert committed.checksums == {}
    assert "begin_weight_update" not in fake.calls
    assert "end_weight_update" not in fake.calls
    assert "get_weights_by_name" in fake.calls, "weights are read back by a synchronising call"


async def test_a_session_left_open_by_somebody_who_is_gone_is_closed(bench, tools):
    answers = iter(["is open", None])

    async def once(request, body):
        if next(answers) is None:
            return None
        from aiohttp import web

        return web.json_response({"success": False, "message": "a session is open"}, status=400)

    bench.engines["a"].reactions["begin_weight_update"] = once
    prepared = await bench.transactions.prepare(tools.request())
    acks = await tools.transfer(bench, prepared)
    assert all(a.ok for ack in acks for a in ack.acks)
    assert bench.engines["a"].calls[3:6] == [
        "begin_weight_update",
        "end_weight_update",
        "begin_weight_update",
    ]


@pytest.mark.parametrize(("step", "fault"), faults_of(*OPENING, "update_weights_from_tensor"))
async def test_an_engine_that_fails_in_the_transfer_is_quarantined_alone(bench, tools, step, fault):
    await serve_first_version(bench, tools)
    getattr(bench.engines["a"], fault)(step)
    prepared = await bench.transactions.prepare(tools.request(label=1, attempt=2))
    acks = await tools.transfer(bench, prepared)
    told = {a.engine_id: a for a in acks[0].acks}
    assert (told["a"].ok, told["b"].ok) == (False, True)
    assert "a: POST" in told["a"].message
    assert not acks[0].group_broken
    assert bench.states() == {"a": "QUARANTINED", "b": "UPDATING"}
    committed = await tools.commit(bench, prepared)
    assert committed.serving == ("b",)
    assert list(committed.quarantined) == ["a"]
    assert bench.states() == {"a": "QUARANTINED", "b": "SERVING"}


@pytest.mark.parametrize(
    ("step", "fault"),
    faults_of("end_weight_update", "weights_checker", "update_weight_version", "continue_generation"),
)
async def test_an_engine_that_fails_in_the_commit_is_quarantined_alone(bench, tools, step, fault):
    prepared = await bench.transactions.prepare(tools.request())
    await tools.transfer(bench, prepared)
    getattr(bench.engines["a"], fault)(step)
    committed = await tools.commit(bench, prepared)
    assert committed.serving == ("b",)
    assert list(committed.quarantined) == ["a"]
    assert bench.states() == {"a": "QUARANTINED", "b": "SERVING"}
    verified = step in ("update_weight_version", "continue_generation")
    expected = ("a", "b") if verified else ("b",)
    assert bench.ledger.published[0].members == expected


async def test_a_quarantined_engine_is_given_the_version_once_it_answers(bench, tools):
    bench.engines["a"].break_down("update_weights_from_tensor")
    prepared = await bench.transactions.prepare(tools.request())
    await tools.transfer(bench, prepared)
    committed = await tools.commit(bench, prepared)
    again = tools.request(version=committed.version, attempt=2)
    assert (await bench.transactions.prepare(again)).members == ()
    del bench.engines["a"].reactions["update_weights_from_tensor"]
    record = bench.record("a")
    bench.fleet.probe_ok(record, "updating/x", generation=record.generation, now=0.0)
    prepared = await bench.transactions.prepare(again)
    assert [m.engine_id for m in prepared.members] == ["a"]
    await tools.transfer(bench, prepared)
    assert (await tools.commit(bench, prepared)).serving == ("a",)
    assert bench.states() == {"a": "SERVING", "b": "SERVING"}
    assert len(bench.ledger.published) == 1, "a version is published once"


async def test_a_first_bucket_that_all_refuse_costs_nothing(bench, tools):
    await serve_first_version(bench, tools)
    for fake in bench.engines.values():
        fake.refuse("update_weights_from_tensor", "w0 has another shape")
    prepared = await bench.transactions.prepare(tools.request(label=1, attempt=2))
    ack = await take_part(bench, prepared).take(tools.bucket(prepared, 0))
    assert [(a.ok, "another shape" in a.message) for a in ack.acks] == [(False, True)] * 2
    assert bench.states() == {"a": "SERVING", "b": "SERVING"}
    assert all(bench.record(name).version == 1 for name in "ab")
    assert all(f.version_string == "run/1/0" and not f.paused for f in bench.engines.values())
    with pytest.raises(errors.FailedPrecondition, match="no member is left"):
        await take_part(bench, prepared).take(tools.bucket(prepared, 1))


async def test_a_refusal_by_an_engine_that_may_have_written_is_a_failure(bench, tools, fake_engine):
    fake = await fake_engine("c")
    bench.join(fake, engine="sglang 0.5.21")
    fake.refuse("update_weights_from_tensor")
    prepared = await bench.transactions.prepare(tools.request(engine_ids=("c",)))
    await take_part(bench, prepared).take(tools.bucket(prepared, 0))
    assert bench.states()["c"] == "QUARANTINED"


async def test_a_second_bucket_that_is_refused_leaves_a_mixture_that_nobody_serves(bench, tools):
    prepared = await bench.transactions.prepare(tools.request())
    transaction = take_part(bench, prepared)
    await transaction.take(tools.bucket(prepared, 0))
    bench.engines["a"].refuse("update_weights_from_tensor")
    await transaction.take(tools.bucket(prepared, 1))
    assert bench.states() == {"a": "QUARANTINED", "b": "UPDATING"}


async def test_engines_that_disagree_on_the_checksum_are_all_given_up(bench, tools):
    prepared = await bench.transactions.prepare(tools.request())
    await tools.transfer(bench, prepared)
    bench.engines["a"].checksum = "other"
    with pytest.raises(errors.DataLoss, match="different weights"):
        await tools.commit(bench, prepared)
    assert bench.states() == {"a": "QUARANTINED", "b": "QUARANTINED"}
    assert bench.ledger.published == []


async def test_the_odd_one_out_is_given_up_where_most_agree(bench, tools, fake_engine):
    bench.join(await fake_engine("c"))
    prepared = await bench.transactions.prepare(tools.request())
    await tools.transfer(bench, prepared)
    bench.engines["b"].checksum = "other"
    committed = await tools.commit(bench, prepared)
    assert committed.serving == ("a", "c")
    assert "checksum other differs" in committed.quarantined["b"]


async def test_an_engine_that_came_up_again_in_between_is_found_out(bench, tools):
    prepared = await bench.transactions.prepare(tools.request())
    await tools.transfer(bench, prepared)
    bench.engines["a"].version_string = "default"
    committed = await tools.commit(bench, prepared)
    assert "it restarted" in committed.quarantined["a"]


async def test_while_the_ledger_is_away_only_the_publication_waits(bench, tools):
    prepared = await bench.transactions.prepare(tools.request())
    await tools.transfer(bench, prepared)
    bench.ledger.away = True
    committed = await tools.commit(bench, prepared)
    assert not committed.published
    assert bench.states() == {"a": "SERVING", "b": "SERVING"}
    assert not bench.engines["a"].paused


async def test_a_version_that_the_ledger_refuses_is_served_by_nobody(bench, tools):
    prepared = await bench.transactions.prepare(tools.request())
    await tools.transfer(bench, prepared)
    bench.ledger.refusal = errors.StaleTerm("term 1 is over")
    with pytest.raises(errors.StaleTerm):
        await tools.commit(bench, prepared)
    assert bench.states() == {"a": "STALE", "b": "STALE"}
    for fake in bench.engines.values():
        assert fake.version_string == f"updating/{prepared.transaction_id}"
        assert not fake.paused
        assert "abort_request" in fake.calls


async def test_a_commit_of_other_than_what_was_sent_is_refused_and_can_be_mended(bench, tools):
    prepared = await bench.transactions.prepare(tools.request())
    transaction = take_part(bench, prepared)
    await transaction.take(tools.bucket(prepared, 0))
    with pytest.raises(errors.InvalidArgument, match="num_buckets = 2"):
        await tools.commit(bench, prepared)
    with pytest.raises(errors.FailedPrecondition, match="w1"):
        await tools.commit(bench, prepared, num_buckets=1)
    await transaction.take(tools.bucket(prepared, 1))
    assert (await tools.commit(bench, prepared)).serving == ("a", "b")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"fleet_epoch": 99}, errors.StaleEpoch, "fleet_epoch = 99"),
        ({"bucket_index": 1}, errors.InvalidArgument, "bucket 0 comes next"),
        ({"handles": ()}, errors.InvalidArgument, "handles of bucket 0: none for engine a"),
        (
            {"handles": (t.HandlesOfEngine(engine_id="a", handles=(b"x", b"y")),)},
            errors.InvalidArgument,
            "2 were sent for 1 ranks",
        ),
        (
            {"tensors": (t.TensorSpec(name="w0", dtype="float32", shape=(3,)),)},
            errors.InvalidArgument,
            "'w0' as float32 \\[3\\] is not in the manifest",
        ),
        (
            {"tensors": (t.TensorSpec(name="zz", dtype="float32", shape=(2,)),)},
            errors.InvalidArgument,
            "unknown name",
        ),
    ],
)
async def test_a_header_that_does_not_fit_reaches_no_engine(bench, tools, change, error, says):
    prepared = await bench.transactions.prepare(tools.request())
    header = tools.bucket(prepared, 0)
    wrong = dataclasses.replace(header, **change)
    with pytest.raises(error, match=says):
        await take_part(bench, prepared).take(wrong)
    assert bench.engines["a"].calls == []
    assert all(a.ok for a in (await take_part(bench, prepared).take(header)).acks)


# ---- the end without a commit ------------------------------------------------------------------------------


async def abort(bench, prepared, *, term=1):
    return await bench.transactions.abort(prepared.transaction_id, term=term, reason="test")


async def test_aborted_before_the_first_bucket_nothing_happened(bench, tools):
    await serve_first_version(bench, tools)
    prepared = await bench.transactions.prepare(tools.request(label=1, attempt=2))
    assert await abort(bench, prepared) == ()
    assert bench.states() == {"a": "SERVING", "b": "SERVING"}
    assert bench.engines["a"].calls == []
    assert await abort(bench, prepared) == ()
    with pytest.raises(errors.FailedPrecondition, match="was aborted"):
        await take_part(bench, prepared).take(tools.bucket(prepared, 0))


async def test_aborted_in_mid_transfer_members_are_stale_and_their_requests_end(bench, tools):
    await serve_first_version(bench, tools)
    prepared = await bench.transactions.prepare(tools.request(label=1, attempt=2))
    await take_part(bench, prepared).take(tools.bucket(prepared, 0))
    assert await abort(bench, prepared) == ("a", "b")
    assert await abort(bench, prepared) == ("a", "b")
    assert bench.states() == {"a": "STALE", "b": "STALE"}
    for fake in bench.engines.values():
        assert fake.calls[-3:] == ["end_weight_update", "abort_request", "continue_generation"]
    with pytest.raises(errors.FailedPrecondition, match="was aborted"):
        await tools.commit(bench, prepared)


async def test_an_engine_that_does_not_follow_an_abort_is_quarantined(bench, tools):
    prepared = await bench.transactions.prepare(tools.request())
    await take_part(bench, prepared).take(tools.bucket(prepared, 0))
    bench.engines["a"].hang("continue_generation")
    assert await abort(bench, prepared) == ("b",)
    assert bench.states() == {"a": "QUARANTINED", "b": "STALE"}


async def test_an_abort_interrupts_a_bucket_that_hangs(bench, tools):
    prepared = await bench.transactions.prepare(tools.request())
    bench.engines["a"].hang("update_weights_from_tensor")
    taking = asyncio.create_task(take_part(bench, prepared).take(tools.bucket(prepared, 0)))
    await bench.engines["a"].called("update_weights_from_tensor")
    await abort(bench, prepared)
    with pytest.raises(errors.FailedPrecondition, match="was aborted"):
        await taking
    assert bench.states() == {"a": "STALE", "b": "STALE"}


async def test_a_stream_that_breaks_in_mid_transfer_aborts(bench, tools):
    prepared = await bench.transactions.prepare(tools.request())
    transaction = take_part(bench, prepared)
    await transaction.take(tools.bucket(prepared, 0))
    bench.transactions.stream_ended(prepared.transaction_id)
    await tools.until(transaction.ended.is_set)
    assert transaction.phase is Phase.ABORTED
    assert bench.states() == {"a": "STALE", "b": "STALE"}


async def test_after_the_last_bucket_the_commit_has_a_while_to_come(bench, tools):
    prepared = await bench.transactions.prepare(tools.request())
    await tools.transfer(bench, prepared)
    bench.transactions.stream_ended(prepared.transaction_id)
    await asyncio.sleep(0)
    assert (await tools.commit(bench, prepared)).published
    late = await bench.transactions.prepare(tools.request(label=1, attempt=2))
    await tools.transfer(bench, late)
    bench.transactions.stream_ended(late.transaction_id)
    await tools.until(take_part(bench, late).ended.is_set)
    assert "no commit came" in take_part(bench, late).why_aborted
    assert bench.states() == {"a": "STALE", "b": "STALE"}


async def test_the_deadline_of_a_transaction_ends_it(bench, tools):
    prepared = await bench.transactions.prepare(tools.request(timeout_s=3600.0))
    transaction = take_part(bench, prepared)
    await transaction.take(tools.bucket(prepared, 0))
    skip(3590.0)
    await tools.until(lambda: bench.ledger.leases >= 2)
    assert transaction.is_open
    skip(10.0)
    await tools.until(transaction.ended.is_set)
    assert transaction.why_aborted == "its deadline passed"
    assert bench.states() == {"a": "STALE", "b": "STALE"}


async def test_a_router_that_stops_aborts_and_frees_its_members(bench, tools):
    prepared = await bench.transactions.prepare(tools.request())
    await take_part(bench, prepared).take(tools.bucket(prepared, 0))
    await bench.transactions.close()
    assert bench.states() == {"a": "STALE", "b": "STALE"}
    assert not any(f.paused for f in bench.engines.values())


async def test_a_member_that_leaves_or_restarts_is_out(bench, tools):
    prepared = await bench.transactions.prepare(tools.request())
    bench.fleet.remove("a")
    acks = await tools.transfer(bench, prepared)
    assert [a.engine_id for a in acks[0].acks if not a.ok] == ["a"]
    assert (await tools.commit(bench, prepared)).serving == ("b",)
    assert bench.engines["a"].calls == []


# ---- collectives -------------------------------------------------------------------------------------------


def gloo(tools, **changes):
    return tools.request(transport=Transport.GLOO, master_address="127.0.0.1", master_port=1234, **changes)


async def test_members_of_a_collective_join_its_group_by_rank(bench, tools):
    prepared = await bench.transactions.prepare(gloo(tools))
    assert [m.rank_offset for m in prepared.members] == [1, 2]
    assert (prepared.world_size, prepared.group_name) == (3, "run/1/1/1")
    acks = await tools.transfer(bench, prepared, transport=Transport.GLOO)
    assert not any(a.group_broken for a in acks)
    await tools.commit(bench, prepared)
    for rank, fake in enumerate(bench.engines.values(), start=1):
        [joined] = fake.bodies["init_weights_update_group"]
        assert joined == {
            "master_address": "127.0.0.1",
            "master_port": 1234,
            "rank_offset": rank,
            "world_size": 3,
            "group_name": "run/1/1/1",
            "backend": "gloo",
        }


@pytest.mark.parametrize("step", ["init_weights_update_group", *OPENING])
async def test_a_collective_that_breaks_before_a_byte_costs_nothing(bench, tools, step):
    await serve_first_version(bench, tools)
    bench.engines["a"].refuse(step)
    prepared = await bench.transactions.prepare(gloo(tools, label=1, attempt=2))
    ack = await take_part(bench, prepared).take(tools.bucket(prepared, 0, transport=Transport.GLOO))
    assert ack.group_broken
    assert bench.states()["b"] == "SERVING"
    assert "update_weights_from_distributed" not in bench.engines["b"].calls
    assert bench.engines["b"].version_string == "run/1/0"
    assert not bench.engines["b"].paused


async def test_a_collective_that_breaks_in_mid_transfer_is_over_for_all(bench, tools):
    bench.engines["a"].hang_up("update_weights_from_distributed")
    bench.engines["b"].hang("update_weights_from_distributed")
    prepared = await bench.transactions.prepare(gloo(tools))
    ack = await take_part(bench, prepared).take(tools.bucket(prepared, 0, transport=Transport.GLOO))
    assert ack.group_broken
    assert [a.ok for a in ack.acks] == [False, False]
    assert bench.states() == {"a": "QUARANTINED", "b": "STALE"}
    assert "destroy_weights_update_group" in bench.engines["b"].calls
    for fake in bench.engines.values():
        fake.reactions.clear()
    record = bench.record("a")
    bench.fleet.probe_ok(record, "updating/x", generation=record.generation, now=0.0)
    again = await bench.transactions.prepare(gloo(tools, attempt=2))
    assert again.group_name != prepared.group_name
    await tools.transfer(bench, again, transport=Transport.GLOO)
    assert (await tools.commit(bench, again)).serving == ("a", "b")


async def test_an_engine_that_breaks_every_group_does_not_keep_the_others_from_their_weights(bench, tools):
    await serve_first_version(bench, tools)
    for (
        fake
    ) in bench.engines.values():  # b's join fails because a never comes: nobody can say whose fault it is
        fake.refuse("init_weights_update_group")

    async def attempt(number: int) -> tuple[list[str], bool]:
        prepared = await bench.transactions.prepare(gloo(tools, label=1, attempt=number))
        ack = await take_part(bench, prepared).take(tools.bucket(prepared, 0, transport=Transport.GLOO))
        return [m.engine_id for m in prepared.members], ack.group_broken

    assert await attempt(1) == (["a", "b"], True)
    assert await attempt(2) == (["a"], True)
    assert bench.states() == {"a": "SERVING", "b": "SERVING"}, "they keep what they have"
    bench.engines["b"].reactions.clear()
    prepared = await bench.transactions.prepare(gloo(tools, label=1, attempt=3))
    await tools.transfer(bench, prepared, transport=Transport.GLOO)
    assert (await tools.commit(bench, prepared)).serving == ("b",)
    assert bench.states() == {"a": "STALE", "b": "SERVING"}


async def test_an_engine_that_is_silent_costs_one_deadline_and_joins_nothing_while_it_is_told(
    tools, fake_engine
):
    bench = tools.bench(call_timeout_s=0.3)
    for name in "ab":
        bench.join(await fake_engine(name))
    silent, record = bench.engines["a"], bench.record("a")
    silent.hang("pause_generation")
    silent.hang("destroy_weights_update_group", deadline_s=3600.0)
    prepared = await bench.transactions.prepare(gloo(tools))
    ack = await take_part(bench, prepared).take(tools.bucket(prepared, 0, transport=Transport.GLOO))
    assert ack.group_broken
    assert bench.states() == {"a": "QUARANTINED", "b": "STALE"}
    assert not bench.engines["b"].paused
    assert silent.calls.count("pause_generation") == 1
    await silent.called("destroy_weights_update_group")
    bench.fleet.probe_ok(record, "updating/x", generation=record.generation, now=0.0)
    assert record.cleaning == 1
    assert not bench.fleet.eligible(record, record.eligible_at)
    skip(3600.0)
    await tools.until(lambda: not record.cleaning)
    assert bench.fleet.eligible(record, record.eligible_at)
    assert "continue_generation" not in silent.calls  # one silence is enough
    silent.reactions.clear()
    again = await bench.transactions.prepare(gloo(tools, attempt=2))
    await tools.transfer(bench, again, transport=Transport.GLOO)
    assert (await tools.commit(bench, again)).serving == ("a", "b")


async def test_a_member_that_is_silent_long_after_the_others_have_a_bucket_is_not_waited_for(
    tools, fake_engine
):
    bench = tools.bench(engine_call_timeout_s=0.3, bucket_timeout_s=3600.0)
    for name in "ab":
        bench.join(await fake_engine(name))
    bench.engines["a"].hang("update_weights_from_distributed")
    prepared = await bench.transactions.prepare(gloo(tools, timeout_s=3600.0))
    ack = await take_part(bench, prepared).take(tools.bucket(prepared, 0, transport=Transport.GLOO))
    assert ack.group_broken
    assert bench.states() == {"a": "QUARANTINED", "b": "STALE"}


async def test_a_member_that_the_fleet_gives_up_while_it_joins_is_not_waited_for(tools, fake_engine):
    bench = tools.bench(bucket_timeout_s=3600.0)
    for name in "ab":
        fake = await fake_engine(name)
        bench.join(fake)
        fake.hang("init_weights_update_group")  # as all do while one of them is not there
    prepared = await bench.transactions.prepare(gloo(tools, timeout_s=3600.0))
    taking = asyncio.create_task(
        take_part(bench, prepared).take(tools.bucket(prepared, 0, transport=Transport.GLOO))
    )
    await bench.engines["b"].called("init_weights_update_group")
    record = bench.record("a")
    for _ in range(3):
        bench.fleet.probe_failed(record, "no answer", generation=record.generation)
    await tools.until(taking.done)
    assert taking.result().group_broken
    assert bench.states() == {"a": "DEAD", "b": "STALE"}
    assert bench.engines["b"].version_string == "default"


# ---- who may open one --------------------------------------------------------------------------------------


async def test_the_same_preparation_again_is_the_same_transaction(bench, tools):
    first, second = await asyncio.gather(
        bench.transactions.prepare(tools.request()), bench.transactions.prepare(tools.request())
    )
    assert first == second
    other = await bench.transactions.prepare(tools.request(attempt=2))
    assert other.transaction_id != first.transaction_id
    assert take_part(bench, first).phase is Phase.ABORTED


async def test_a_lower_term_is_refused_and_a_higher_one_takes_over(bench, tools):
    prepared = await bench.transactions.prepare(tools.request(term=5))
    await take_part(bench, prepared).take(tools.bucket(prepared, 0))
    with pytest.raises(errors.StaleTerm, match="term = 4"):
        await bench.transactions.prepare(tools.request(term=4))
    with pytest.raises(errors.StaleTerm):
        await abort(bench, prepared, term=4)
    successor = await bench.transactions.prepare(tools.request(term=6))
    assert take_part(bench, prepared).phase is Phase.ABORTED
    assert [m.engine_id for m in successor.members] == ["a", "b"]
    with pytest.raises(errors.StaleTerm):
        await bench.transactions.commit(
            prepared.transaction_id, fleet_epoch=prepared.fleet_epoch, term=5, num_buckets=1
        )


async def test_a_run_that_another_router_holds_is_left_alone(bench, tools):
    bench.ledger.held_by_another = True
    with pytest.raises(errors.Unavailable, match="another router"):
        await bench.transactions.prepare(tools.request())
    assert all(not bench.record(name).transaction for name in "ab")


async def test_a_router_that_loses_the_run_aborts(bench, tools, monkeypatch):
    monkeypatch.setattr(transactions, "LEASE_TTL_S", 0.06)
    prepared = await bench.transactions.prepare(tools.request())
    transaction = take_part(bench, prepared)
    await transaction.take(tools.bucket(prepared, 0))
    await tools.until(lambda: bench.ledger.leases >= 3)
    assert transaction.is_open
    bench.ledger.held_by_another = True
    await tools.until(transaction.ended.is_set)
    assert "another router" in transaction.why_aborted
    assert bench.states() == {"a": "STALE", "b": "STALE"}


async def test_nobody_there_opens_nothing_and_reserves_nothing(bench, tools):
    for name in "ab":
        bench.fleet.remove(name)
    prepared = await bench.transactions.prepare(tools.request())
    assert (prepared.transaction_id, prepared.members) == ("", ())
    assert bench.ledger.reserved == {}


async def test_only_engines_that_take_the_transport_are_members(bench, tools, fake_engine):
    bench.join(await fake_engine("c"), transports=(Transport.DISK,))
    prepared = await bench.transactions.prepare(tools.request())
    assert [m.engine_id for m in prepared.members] == ["a", "b"]
    with pytest.raises(errors.InvalidArgument, match="engine c takes DISK"):
        await bench.transactions.prepare(tools.request(engine_ids=("c",), attempt=2))


async def test_a_version_can_be_given_again_only_as_it_was_published(bench, tools):
    with pytest.raises(errors.FailedPrecondition, match="version = 7"):
        await bench.transactions.prepare(tools.request(version=7))


async def test_a_folder_needs_no_list_of_tensors(bench, tools):
    prepared = await bench.transactions.prepare(tools.request(transport=Transport.DISK, manifest=()))
    header = t.BucketHeader(
        transaction_id=prepared.transaction_id,
        fleet_epoch=prepared.fleet_epoch,
        bucket_index=0,
        handles=(t.HandlesOfEngine(handles=(b"/weights/1",)),),
    )
    await take_part(bench, prepared).take(header)
    assert (await tools.commit(bench, prepared, num_buckets=1)).serving == ("a", "b")
    [body] = bench.engines["a"].bodies["update_weights_from_disk"]
    assert body == {
        "model_path": "/weights/1",
        "load_format": "auto",
        "flush_cache": False,
        "abort_all_requests": False,
    }


async def test_a_version_that_redis_forgot_is_stated_again(bench, tools):
    await serve_first_version(bench, tools)
    [published] = bench.ledger.published
    assert (await bench.transactions.prepare(tools.request(attempt=2))).members == ()
    assert bench.ledger.published == [published], "a ledger that knows it hears nothing new"
    bench.ledger.published.clear()
    assert (await bench.transactions.prepare(tools.request(attempt=3))).members == ()
    [stated] = bench.ledger.published
    assert (stated.version, stated.label, stated.members) == (1, 0, ("a", "b"))


async def test_a_version_that_the_ledger_will_never_hold_again_is_replaced(bench, tools):
    await serve_first_version(bench, tools)
    bench.ledger.published.clear()
    bench.ledger.refusal = errors.FailedPrecondition("its number was given to other weights")
    with pytest.raises(errors.FailedPrecondition):
        await bench.transactions.prepare(tools.request(attempt=2))
    assert bench.states() == {"a": "STALE", "b": "STALE"}
    prepared = await bench.transactions.prepare(tools.request(attempt=3))
    assert [m.engine_id for m in prepared.members] == ["a", "b"]
    assert prepared.version == 2


async def test_weights_by_cuda_ipc_are_read_back_by_checksum_also_where_nobody_compares(fake_engine, tools):
    """SGLang reads back single tensors of few models; its checksum waits for the GPU with every one."""
    bench = tools.bench(verify_checksum=False)
    fake = await fake_engine("a")
    uuids = ("GPU-1",)
    able = (t.Transport.CUDA_IPC,)
    bench.join(fake, engine="sglang 0.5.17", update_session=False, transports=able, gpu_uuids=uuids)
    try:
        prepared = await bench.transactions.prepare(tools.request(transport=t.Transport.CUDA_IPC))
        assert [m.gpu_uuids for m in prepared.members] == [uuids]
        await tools.transfer(bench, prepared, transport=t.Transport.CUDA_IPC)
        committed = await tools.commit(bench, prepared)
    finally:
        await bench.transactions.close()
        bench.pool.close()
    assert (committed.serving, committed.checksums) == (("a",), {})
    assert fake.bodies["weights_checker"] == [{"action": "checksum"}]
    assert "get_weights_by_name" not in fake.calls
    [first, _] = fake.bodies["update_weights_from_tensor"]
    assert first == {
        "serialized_named_tensors": ['{"kind": "shm"}'],
        "load_format": "flattened_bucket",
        "flush_cache": False,
        "abort_all_requests": False,
    }
