"""Process groups that outlive their transaction, and members that hang in one."""

from __future__ import annotations

import asyncio

import orjson
import pytest
from aiohttp import web

from milepost import errors
from milepost import types as t
from milepost.types import Transport

NCCL = Transport.NCCL
JOIN, LEAVE = "init_weights_update_group", "destroy_weights_update_group"
TAKE = "update_weights_from_distributed"


def collective(tools, **changes):
    given = {"transport": NCCL, "master_address": "127.0.0.1", "master_port": 1234}
    return tools.request(**(given | changes))


@pytest.fixture
async def launched(tools, fake_engine):
    """Transactions over three engines that our launcher started."""
    bench = tools.bench(call_timeout_s=0.5, bucket_timeout_s=0.5)
    for name in "abc":
        bench.join(await fake_engine(name), engine="sglang 0.5.21", restartable=True, nccl_version="2.28.9")
    yield bench
    await bench.transactions.close()
    bench.pool.close()


async def publish(bench, tools, **changes):
    prepared = await bench.transactions.prepare(collective(tools, **changes))
    await tools.transfer(bench, prepared, transport=NCCL)
    await tools.commit(bench, prepared)
    return prepared


def first_bucket(bench, tools, prepared):
    return bench.transactions.find(prepared.transaction_id).take(tools.bucket(prepared, 0, transport=NCCL))


async def again(bench, tools, name):
    """The launcher has started it again."""
    fake = bench.engines[name]
    fake.reactions.clear()
    fake.version_string = "default"
    record = bench.record(name)
    able = t.EngineCapabilities(engine="sglang 0.5.21", update_session=True, checksum=True, restartable=True)
    bench.fleet.join(
        t.Engine(engine_id=name, url=fake.url, capabilities=able, instance_id=f"after {record.lives}"),
        now=0.0,
    )
    bench.fleet.probe_ok(record, "default", generation=record.generation, now=0.0)


# ---- how long one lives ------------------------------------------------------------------------------------


async def test_a_group_is_used_again_as_long_as_its_members_are_the_same(launched, tools):
    first = await publish(launched, tools)
    second = await publish(launched, tools, label=1, attempt=2, group_name=first.group_name)
    assert second.group_name == first.group_name
    assert [m.rank_offset for m in second.members] == [1, 2, 3]
    for fake in launched.engines.values():
        assert fake.calls.count(JOIN) == 1
        assert LEAVE not in fake.calls
        assert {b["group_name"] for b in fake.bodies[TAKE]} == {first.group_name}


async def test_every_call_of_a_broadcast_says_that_it_neither_flushes_nor_aborts(launched, tools):
    await publish(launched, tools)
    for body in launched.engines["a"].bodies[TAKE]:
        assert (body["flush_cache"], body["abort_all_requests"]) == (False, False)
        assert body["load_format"] == "flattened_bucket"


@pytest.mark.parametrize("held", ["", "another"])
async def test_a_trainer_that_does_not_hold_the_group_gets_a_new_one(launched, tools, held):
    first = await publish(launched, tools)
    second = await publish(launched, tools, label=1, attempt=2, group_name=held)
    assert second.group_name not in ("", first.group_name)
    fake = launched.engines["a"]
    group_calls = [call for call in fake.calls if call in (JOIN, LEAVE)]
    assert group_calls == [JOIN, LEAVE, JOIN], "the old one is left before the new one is joined"
    assert fake.bodies[LEAVE] == [{"group_name": first.group_name}]


async def test_a_member_that_was_started_again_ends_the_group(launched, tools):
    first = await publish(launched, tools)
    await again(launched, tools, "b")
    alone = await publish(launched, tools, attempt=2, version=1, group_name=first.group_name)
    assert [m.engine_id for m in alone.members] == ["b"], "it does not wait for the next step"
    for name in "ac":
        await launched.engines[name].called(LEAVE)
    assert LEAVE not in launched.engines["b"].calls
    whole = await publish(launched, tools, label=1, attempt=1, group_name=alone.group_name)
    assert (len(whole.members), whole.world_size) == (3, 4)
    assert launched.engines["b"].bodies[LEAVE] == [{"group_name": alone.group_name}]


async def test_a_router_that_knows_nothing_has_the_trainers_group_left(launched, tools):
    prepared = await publish(launched, tools, group_name="of another router")
    assert prepared.group_name != "of another router"
    assert launched.engines["a"].bodies[LEAVE] == [{"group_name": "of another router"}]


async def test_an_engine_that_restarted_unnoticed_is_not_told_of_a_group_it_is_not_in(launched, tools):
    first = await publish(launched, tools)
    launched.engines["b"].version_string = "default"
    prepared = await launched.transactions.prepare(
        collective(tools, label=1, attempt=2, group_name=first.group_name)
    )
    taken = launched.engines["b"].calls.count(TAKE)
    ack = await first_bucket(launched, tools, prepared)
    assert ack.group_broken
    assert "it restarted" in ack.acks[1].message
    assert launched.engines["b"].calls.count(TAKE) == taken
    assert launched.states() == {"a": "SERVING", "b": "SERVING", "c": "SERVING"}
    later = await launched.transactions.prepare(collective(tools, label=1, attempt=3))
    assert later.group_name != first.group_name


# ---- members that hang -------------------------------------------------------------------------------------


async def test_a_group_that_breaks_in_mid_broadcast_has_every_launched_member_started_again(launched, tools):
    first = await publish(launched, tools)
    launched.engines["b"].hang_up(TAKE)
    prepared = await launched.transactions.prepare(
        collective(tools, label=1, attempt=2, group_name=first.group_name)
    )
    before = {name: len(fake.calls) for name, fake in launched.engines.items()}
    ack = await first_bucket(launched, tools, prepared)
    assert ack.group_broken
    assert set(launched.states().values()) == {"QUARANTINED"}
    for name, fake in launched.engines.items():
        record = launched.record(name)
        assert launched.fleet.heartbeat(name, "i", now=0.0).restart
        assert "must be started again" in record.detail
        assert TAKE in fake.calls[before[name] :]
        assert LEAVE not in fake.calls, "a hung process ends no call"
        launched.fleet.probe_ok(record, fake.version_string, generation=record.generation, now=0.0)
        assert not launched.fleet.eligible(record, record.eligible_at)
    assert not (await launched.transactions.prepare(collective(tools, label=1, attempt=3))).members
    for name in "abc":
        await again(launched, tools, name)
        assert not launched.fleet.heartbeat(name, launched.record(name).instance_id, now=0.0).restart
    assert set(launched.states().values()) == {"STALE"}
    fresh = await publish(launched, tools, label=1, attempt=4)
    assert fresh.group_name != first.group_name
    assert set(launched.states().values()) == {"SERVING"}


async def test_a_trainer_that_gives_up_in_mid_broadcast_leaves_nobody_hanging(launched, tools):
    prepared = await launched.transactions.prepare(collective(tools))
    await first_bucket(launched, tools, prepared)
    await launched.transactions.abort(prepared.transaction_id, term=1, reason="its communicator broke")
    assert all(launched.record(name).restart for name in "abc")


async def test_a_transaction_that_ends_while_members_join_waits_for_them(launched, tools):
    answer = asyncio.Event()

    async def later(request, body):
        await answer.wait()

    first = await publish(launched, tools)
    launched.engines["a"].reactions[LEAVE] = later  # it frees memory of its GPU, which takes a while
    prepared = await launched.transactions.prepare(collective(tools, label=1, attempt=2))
    assert prepared.group_name != first.group_name
    await launched.engines["a"].called(LEAVE)
    aborting = asyncio.create_task(
        launched.transactions.abort(prepared.transaction_id, term=1, reason="not these weights")
    )
    await launched.engines["b"].called(JOIN)
    answer.set()
    assert await aborting == ()
    assert set(launched.states().values()) == {"SERVING"}
    assert not any(launched.record(name).restart for name in "abc")


async def test_a_member_that_does_not_come_back_from_joining_is_started_again(launched, tools):
    launched.engines["a"].hang(JOIN)
    prepared = await launched.transactions.prepare(collective(tools))
    await launched.engines["a"].called(JOIN)
    await launched.transactions.abort(prepared.transaction_id, term=1, reason="not these weights")
    assert [launched.record(name).restart for name in "abc"] == [True, False, False]


async def test_weights_that_arrived_are_no_reason_to_start_anything_again(launched, tools):
    launched.ledger.refusal = errors.FailedPrecondition("not this one")
    prepared = await launched.transactions.prepare(collective(tools))
    await tools.transfer(launched, prepared, transport=NCCL)
    with pytest.raises(errors.FailedPrecondition, match="not this one"):
        await tools.commit(launched, prepared)
    assert set(launched.states().values()) == {"STALE"}
    assert not any(launched.record(name).restart for name in "abc")
    assert all(LEAVE in fake.calls for fake in launched.engines.values())


async def test_a_member_whose_weights_never_arrive_is_started_again_and_the_others_serve(launched, tools):
    prepared = await launched.transactions.prepare(collective(tools))
    await tools.transfer(launched, prepared, transport=NCCL)
    launched.engines["b"].hang("weights_checker")
    committed = await tools.commit(launched, prepared)
    assert committed.serving == ("a", "c")
    assert [launched.record(name).restart for name in "abc"] == [False, True, False]
    for name in "ac":
        await launched.engines[name].called(LEAVE)
    later = await launched.transactions.prepare(
        collective(tools, label=1, attempt=2, group_name=prepared.group_name)
    )
    assert later.group_name != prepared.group_name


async def test_an_engine_known_by_its_url_waits_for_somebody_to_start_it(tools, fake_engine):
    bench = tools.bench(call_timeout_s=0.5, bucket_timeout_s=0.5)
    for name in "ab":
        bench.join(await fake_engine(name), engine="sglang 0.5.21")
    bench.engines["a"].hang_up(TAKE)
    ack = await first_bucket(bench, tools, await bench.transactions.prepare(collective(tools)))
    assert ack.group_broken
    record = bench.record("b")
    mark = bench.engines["b"].version_string
    bench.fleet.probe_ok(record, mark, generation=record.generation, now=0.0)
    assert bench.states()["b"] == "QUARANTINED"
    assert not bench.fleet.eligible(record, record.eligible_at)
    bench.fleet.probe_ok(record, "default", generation=record.generation, now=0.0)
    assert bench.states()["b"] == "STALE"
    assert bench.fleet.eligible(record, 0.0)
    await bench.transactions.close()
    bench.pool.close()


async def test_who_breaks_every_group_is_found_though_all_are_started_again_each_time(launched, tools):
    for fake in launched.engines.values():
        fake.hang(TAKE)

    async def attempt(number: int) -> list[str]:
        prepared = await launched.transactions.prepare(collective(tools, attempt=number))
        ack = await first_bucket(launched, tools, prepared)
        assert ack.group_broken
        members = [m.engine_id for m in prepared.members]
        for name in members:
            await again(launched, tools, name)
        launched.engines["a"].hang(TAKE)
        return members

    assert await attempt(1) == ["a", "b", "c"]
    assert await attempt(2) == ["a"]
    served = await publish(launched, tools, attempt=3)
    assert [m.engine_id for m in served.members] == ["b"], "not a again, though it is another process"


# ---- NCCL's releases ---------------------------------------------------------------------------------------


async def test_an_engine_with_another_nccl_is_left_out_by_name(launched, tools, fake_engine):
    launched.join(await fake_engine("old"), engine="sglang 0.5.21", nccl_version="2.27.5")
    prepared = await launched.transactions.prepare(collective(tools, nccl_version="2.28.9"))
    assert [m.engine_id for m in prepared.members] == ["a", "b", "c"]
    detail = launched.record("old").detail
    assert detail == "engine old has NCCL 2.27.5, the trainer 2.28.9; install the same for both"


async def test_a_fleet_with_another_nccl_is_refused_by_name(launched, tools):
    with pytest.raises(errors.FailedPrecondition, match=r"engine b has NCCL 2\.28\.9, the trainer 2\.29\.1"):
        await launched.transactions.prepare(collective(tools, nccl_version="2.29.1"))
    assert set(launched.states().values()) == {"STALE"}


async def test_an_unknown_nccl_is_taken_for_the_same_with_a_warning(bench, tools, caplog):
    prepared = await bench.transactions.prepare(collective(tools, nccl_version="2.28.9"))
    assert len(prepared.members) == 2
    assert "the NCCL of a, b is not known" in caplog.text


# ---- our loader in every member ----------------------------------------------------------------------------


async def pushed(bench, tools, **report):
    """A transaction whose one header tells of all buckets; each engine's loader reports."""
    prepared = await bench.transactions.prepare(collective(tools))
    said = {"transaction": prepared.transaction_id, "ok": True} | report

    async def answer(request, body):
        return web.json_response([float(byte) for byte in orjson.dumps(said)])

    for fake in bench.engines.values():
        fake.reactions["get_weights_by_name"] = answer
    header = t.BucketHeader(
        transaction_id=prepared.transaction_id,
        fleet_epoch=prepared.fleet_epoch,
        bucket_index=0,
        handles=(t.HandlesOfEngine(handles=(b"order",), load_format="our.loader"),),
        whole=True,
    )
    return prepared, await bench.transactions.find(prepared.transaction_id).take(header)


async def test_engines_with_our_loader_are_told_once_of_all_that_is_broadcast(launched, tools):
    prepared, ack = await pushed(launched, tools)
    assert all(a.ok for a in ack.acks)
    await tools.commit(launched, prepared, num_buckets=1)
    for fake in launched.engines.values():
        [body] = fake.bodies["update_weights_from_tensor"]
        assert (body["serialized_named_tensors"], body["load_format"]) == (["order"], "our.loader")
        assert (body["flush_cache"], body["abort_all_requests"]) == (False, False)
        assert TAKE not in fake.calls
    assert set(launched.states().values()) == {"SERVING"}


async def test_a_loader_that_gave_up_in_time_need_not_be_started_again(launched, tools):
    _, ack = await pushed(launched, tools, ok=False, message="not all weights came within 3 s")
    assert ack.group_broken
    assert "not all weights came" in ack.acks[0].message
    assert set(launched.states().values()) == {"STALE"}
    assert not any(launched.record(name).restart for name in "abc")
    assert all(LEAVE in fake.calls for fake in launched.engines.values())
