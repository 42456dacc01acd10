"""Short cuts of the buffer: packed messages, a shared connection, staged payloads, scripts in parts."""

from __future__ import annotations

import asyncio
import importlib.resources
import os
import re
import signal

import hiredis
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from loop_clock import skip
from milepost import errors
from milepost import types as t
from milepost.convert import to_proto
from milepost.groups import Chunk, pack_chunks, pack_lease, pack_put
from milepost.v1 import buffer_pb2 as pb
from milepost_buffer.connection import RedisLink
from milepost_buffer.embedded import EmbeddedRedis
from milepost_buffer.ledger import open_ledger
from milepost_buffer.store import prefix_of, scripts_of
from milepost_buffer.wire import Wire
from stack import until

SOURCE = importlib.resources.files("milepost_buffer").joinpath("ledger.lua").read_text()


def command(*args: str | bytes | int) -> bytes:
    return hiredis.pack_command(args)


@pytest.fixture
async def link(redis_url: str):
    link = RedisLink(redis_url)
    yield link
    await link.close()


def put_by_protobuf(run_id: str, groups: list[t.Group]) -> pb.PutGroupsRequest:
    return pb.PutGroupsRequest(run_id=run_id, groups=[to_proto(g) for g in groups])


@pytest.mark.parametrize("sizes", [[], [1], [0, 127, 128, 20_000], [3_000_000]])
def test_a_packed_put_is_what_protobuf_writes(make_group, sizes: list[int]) -> None:
    groups = [
        t.Group(header=make_group(f"p{i}", i + 1).header, payload=os.urandom(size))
        for i, size in enumerate(sizes)
    ]
    packed = pack_put("run", groups)
    assert pb.PutGroupsRequest.FromString(packed) == put_by_protobuf("run", groups)


def test_packed_chunks_are_what_protobuf_reads() -> None:
    payload = os.urandom(300)
    chunks = [Chunk("a", payload, 0, 300), Chunk("b", memoryview(payload)[100:200], 100, 300)]
    expected = [
        pb.GroupChunk(prompt_id=c.prompt_id, data=bytes(c.data), offset_bytes=c.offset_bytes, total_bytes=300)
        for c in chunks
    ]
    assert list(pb.FetchGroupsResponse.FromString(pack_chunks(chunks)).chunks) == expected
    assert pack_chunks([]) == b""


@pytest.mark.parametrize("sizes", [(), (1,), (127, 0, 128, 40_000)], ids=str)
def test_a_packed_lease_is_what_protobuf_would_have_written(sizes: tuple[int, ...]) -> None:
    lease = t.StepLease(
        groups=tuple(t.StepGroup(prompt_id=f"p{i}", position=i, rewards=(1.0,)) for i in range(5)),
        checkpoint_wanted=True,
        published_label=7,
        payloads=tuple(os.urandom(size) for size in sizes),
    )
    assert pack_lease(lease) == to_proto(lease).SerializeToString()


# ------------------------------------------------------------------ the wire


async def test_calls_share_a_connection_and_get_their_own_answers(link) -> None:
    async def echo(i: int) -> tuple[int, bytes]:
        me, reply = await link.ask(
            [command("CLIENT", "ID"), command("ECHO", f"{i}:" + "x" * i * 1000)], replies=2
        )
        return me, reply

    got = await asyncio.gather(*(echo(i) for i in range(200)))
    assert [reply.partition(b":")[0] for _, reply in got] == [str(i).encode() for i in range(200)]
    assert len({me for me, _ in got}) == 1


async def test_an_error_is_an_answer_and_the_wire_stays(link) -> None:
    replies = await link.ask([command("NOSUCH"), command("ECHO", "after")], replies=2)
    assert isinstance(replies[0], ResponseError)
    assert replies[1] == b"after"


async def test_a_caller_that_goes_away_takes_nobody_s_answer(link) -> None:
    await link.ask([command("PING")], replies=1)
    gone = asyncio.ensure_future(link.ask([command("ECHO", "first")], replies=1))
    stays = asyncio.ensure_future(link.ask([command("ECHO", "second")], replies=1))
    await asyncio.sleep(0)
    gone.cancel()
    assert await asyncio.wait_for(stays, 30) == [b"second"]


async def test_a_broken_connection_fails_who_waits_and_the_next_call_opens_another(link, redis_url) -> None:
    [me] = await link.ask([command("CLIENT", "ID")], replies=1)
    waits = asyncio.ensure_future(link.ask([command("BLPOP", "wire:nothing", 0)], replies=1))
    other = Redis.from_url(redis_url)
    try:

        async def blocked() -> bool:
            return (await other.info("clients"))["blocked_clients"] > 0

        await until("it waits", blocked, within_s=30)
        await other.client_kill_filter(_id=me)
        with pytest.raises(RedisConnectionError):
            await asyncio.wait_for(waits, 30)
        assert await link.ask([command("PING")], replies=1) == [b"PONG"]
        assert await link.ask([command("CLIENT", "ID")], replies=1) != [me]
    finally:
        await other.aclose()


async def test_a_redis_that_stands_still_fails_its_callers_in_time(tmp_path) -> None:
    async with EmbeddedRedis(tmp_path / "redis") as redis:
        link = RedisLink(redis.url, timeout_s=3600.0)
        try:
            await link.wait_ready(wait_s=30)
            await link.ask([command("PING")], replies=1)
            os.kill(redis.pid, signal.SIGSTOP)
            calls = [asyncio.ensure_future(link.ask([command("PING")], replies=1)) for _ in range(3)]
            await asyncio.sleep(0)
            skip(3600.0)
            done, _ = await asyncio.wait(calls, timeout=30)
            assert len(done) == 3
            assert all(isinstance(call.exception(), RedisTimeoutError) for call in calls)
        finally:
            os.kill(redis.pid, signal.SIGCONT)
            await link.close()


async def test_what_nobody_asked_for_breaks_a_wire(redis_url) -> None:
    class Talks(asyncio.Protocol):
        def connection_made(self, transport) -> None:
            transport.write(b"+OK\r\n")

    server = await asyncio.get_running_loop().create_server(Talks, "127.0.0.1", 0)
    async with server:
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        wire = Wire(writer, timeout_s=10, on_message=lambda channel, data: None)
        await asyncio.wait_for(wire.closed.wait(), 30)
        with pytest.raises(RedisConnectionError):
            await wire.ask([command("PING")], replies=1)


# ------------------------------------------------------------------ staged payloads


async def test_no_payload_is_left_over_whatever_becomes_of_a_batch(bench, make_group) -> None:
    await bench.put(3)
    leases = await bench.lease(3)
    good, other = (make_group(x.prompt_id, x.attempt) for x in leases[:2])
    late = make_group(leases[2].prompt_id, leases[2].attempt + 1)
    unknown = make_group("nobody", 1)
    batch = [late, good, unknown, good, other]
    results = await bench.ledger.prompts.seal(bench.run_id, groups=batch)
    sealed, lost, nobody = t.SealStatus.SEALED, t.SealStatus.LEASE_LOST, t.SealStatus.UNKNOWN_PROMPT
    assert [r.status for r in results] == [lost, sealed, nobody, t.SealStatus.DUPLICATE, sealed]
    client, prefix = bench.ledger.link.client, prefix_of(bench.run_id)
    assert [k async for k in client.scan_iter(match=prefix.replace("[", "\\[") + "put:*")] == []
    held = {k async for k in client.scan_iter(match=prefix + "g:*")}
    assert held == {f"{prefix}g:{g.header.prompt_id}".encode() for g in (good, other)}
    assert await client.get(f"{prefix}g:{good.header.prompt_id}") == good.payload
    assert not (await bench.audit()).problems


async def test_a_conflicting_seal_leaves_the_payload_that_is_there(bench, make_group) -> None:
    await bench.put(1)
    [lease] = await bench.lease(1)
    first = make_group(lease.prompt_id, lease.attempt)
    second = make_group(lease.prompt_id, lease.attempt, salt="other bytes")
    await bench.ledger.prompts.seal(bench.run_id, groups=[first])
    [result] = await bench.ledger.prompts.seal(bench.run_id, groups=[second])
    assert result.status is t.SealStatus.CONFLICT
    assert (
        await bench.ledger.link.client.get(f"{prefix_of(bench.run_id)}g:{lease.prompt_id}") == first.payload
    )


async def test_seals_go_on_when_redis_lost_the_script(bench) -> None:
    await bench.put(2)
    leases = await bench.lease(2)
    await bench.ledger.link.client.script_flush()
    assert await bench.seal(leases) == [t.SealStatus.SEALED] * 2


async def test_a_full_redis_takes_no_payload_and_says_so(bench) -> None:
    await bench.put(1)
    leases = await bench.lease(1)
    client = bench.ledger.link.client
    try:
        await client.config_set("maxmemory", 1)
        with pytest.raises(errors.ResourceExhausted, match="maxmemory"):
            await bench.seal(leases)
    finally:
        await client.config_set("maxmemory", 0)
    assert (await bench.stats()).payload_bytes == 0
    assert await bench.seal(leases) == [t.SealStatus.SEALED]


async def test_payloads_are_found_by_a_buffer_that_did_not_lease_them(bench) -> None:
    await bench.put(4)
    await bench.seal(await bench.lease(4))
    step = await bench.lease_step(1)
    ids = [g.prompt_id for g in step.groups]
    mine = [x async for x in bench.ledger.steps.payloads(bench.run_id, prompt_ids=ids)]
    async with open_ledger(str(bench.ledger.link.url)) as other:
        theirs = [x async for x in other.steps.payloads(bench.run_id, prompt_ids=ids)]
        with pytest.raises(errors.NotFound, match="nobody"):
            _ = [x async for x in other.steps.payloads(bench.run_id, prompt_ids=[*ids, "nobody"])]
    assert [name for name, _ in mine] == ids
    assert mine == theirs


# ------------------------------------------------------------------ scripts


def test_each_command_has_a_script_whose_lines_are_those_of_the_file() -> None:
    scripts = scripts_of(SOURCE)
    assert set(scripts) == set(re.findall(r"(?m)^function C\.(\w+)", SOURCE))
    lines = SOURCE.split("\n")
    for name, script in scripts.items():
        own = script.source.split("\n")
        assert len(own) == len(lines)
        assert all(mine in ("", theirs) for mine, theirs in zip(own, lines, strict=True))
        assert f"function C.{name}(" in script.source
        assert len(script.source) < 0.75 * len(SOURCE)


def test_sections_with_commands_use_nothing_of_one_another() -> None:
    sections = re.split(r"(?m)^-- -{40,} .+$", SOURCE)
    apart = [s for s in sections if "\nfunction C." in s]
    assert len(apart) > 5
    for section in apart:
        functions = re.findall(r"(?m)^local function (\w+)", section)
        for other in apart:
            if other is not section:
                used = [f for f in functions if re.search(rf"\b{f}\(", other)]
                assert not [f for f in used if f"function {f}(" not in other]
