"""The ledger and its Redis: what is refused at the start, how calls wait, who wakes them."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
import uvloop
from redis.asyncio import Redis

from milepost import errors
from milepost import types as t
from milepost_buffer import wake
from milepost_buffer.connection import SCHEMA_KEY, RedisLink, check_durability, without_password
from milepost_buffer.embedded import EmbeddedRedis
from milepost_buffer.ledger import open_ledger
from milepost_buffer.store import Store
from milepost_buffer.wake import Answer, Bell

SOON_S = 30.0


@pytest.mark.parametrize(
    "persistence, memory, named",
    [
        ({"aof_enabled": 0}, {"maxmemory_policy": "noeviction"}, "appendonly"),
        ({"aof_enabled": 1}, {"maxmemory_policy": "allkeys-lru"}, "maxmemory-policy = allkeys-lru"),
    ],
)
def test_a_redis_that_would_lose_the_ledger_is_refused(persistence, memory, named) -> None:
    with pytest.raises(errors.FailedPrecondition, match=named):
        check_durability(persistence, memory, url="redis://x", require_aof=True)


def test_no_aof_may_be_accepted_by_a_named_setting() -> None:
    memory = {"maxmemory_policy": "noeviction"}
    check_durability({"aof_enabled": 0}, memory, url="redis://x", require_aof=False)
    with pytest.raises(errors.FailedPrecondition, match="require_aof"):
        check_durability({"aof_enabled": 0}, memory, url="redis://x", require_aof=True)


async def test_the_real_redis_is_judged_by_what_it_says(redis_url) -> None:
    client = Redis.from_url(redis_url)
    try:
        await client.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(errors.FailedPrecondition, match="allkeys-lru"):
            async with open_ledger(redis_url):
                pass
    finally:
        await client.config_set("maxmemory-policy", "noeviction")
        await client.aclose()


async def test_another_schema_is_refused(redis_url) -> None:
    client = Redis.from_url(redis_url)
    try:
        await client.set(SCHEMA_KEY, "99")
        with pytest.raises(errors.FailedPrecondition, match="99"):
            async with open_ledger(redis_url):
                pass
    finally:
        await client.delete(SCHEMA_KEY)
        await client.aclose()


async def test_a_run_of_another_schema_is_refused(bench) -> None:
    await bench.ledger.link.client.hset(f"mp:{{{bench.run_id}}}:run", "schema", "99")
    with pytest.raises(errors.FailedPrecondition, match="schema 99"):
        await bench.put(1)


async def test_redis_down_at_the_start_names_url_and_remedy(tmp_path) -> None:
    with pytest.raises(errors.Unavailable) as caught:
        async with open_ledger(f"unix://{tmp_path}/nobody.sock", redis_wait_s=0.1):
            pass
    assert "nobody.sock" in caught.value.message
    assert "redis_url" in caught.value.message


async def test_a_password_is_not_told_and_a_bad_url_is() -> None:
    assert without_password("redis://me:secret@host:1/0") == "redis://me:***@host:1/0"
    assert without_password("redis://host:1") == "redis://host:1"
    with pytest.raises(errors.InvalidArgument, match="redis_url = http://x"):
        async with open_ledger("http://x"):
            pass


async def test_the_script_is_loaded_again_when_redis_lost_it(bench) -> None:
    await bench.ledger.link.client.script_flush()
    await bench.put(1)
    assert (await bench.stats()).waiting == 1


async def test_time_comes_from_redis_unless_injected(redis_url) -> None:
    async with open_ledger(redis_url) as ledger:
        run_id = f"clock-{time.time_ns()}"
        run, _ = await ledger.runs.create(run_id, config=t.RunConfig())
        assert run.created_at is not None
        assert abs(run.created_at.timestamp() - time.time()) < 60
        term = (await ledger.steps.open_term(run_id, consumer_id="trainer")).term
        assert abs(term / 1000 - time.time()) < 60


# ------------------------------------------------------------------------------------------ waiting


async def test_a_waiting_step_is_woken_by_another_replica(bench, redis_url) -> None:
    await bench.put(2)
    leases = await bench.lease(2)
    waiting = asyncio.create_task(bench.lease_step(1, max_wait_s=60))
    await _until_listening(bench.ledger.bell, bench.run_id)
    async with open_ledger(redis_url, clock=bench.clock) as replica:
        original, bench.ledger = bench.ledger, replica
        await bench.seal(leases)
        bench.ledger = original
    assert len((await asyncio.wait_for(waiting, SOON_S)).groups) == 2


async def test_waiting_gateways_and_clients_are_woken(bench, make_prompt) -> None:
    lease = bench.ledger.prompts.lease(
        bench.run_id, gateway_id="g", instance_id="i", max_prompts=1, max_wait_s=60
    )
    gateway = asyncio.create_task(lease)
    await _until_listening(bench.ledger.bell, bench.run_id)
    await bench.put(1)
    assert len((await asyncio.wait_for(gateway, SOON_S)).leases) == 1
    await bench.put(6)
    put = bench.ledger.prompts.put(bench.run_id, prompts=[make_prompt("more")], max_wait_s=60)
    client = asyncio.create_task(put)
    await _until_listening(bench.ledger.bell, bench.run_id)
    await bench.lease(1)
    assert (await asyncio.wait_for(client, SOON_S)).accepted == 1


async def test_a_waiting_gateway_is_woken_by_the_next_expiry(make_bench) -> None:
    async with make_bench(lease_ttl_s=0.3) as bench:
        bench.clock.now_ms = None  # Redis's own
        await bench.put(1)
        (first,) = await bench.lease(1)
        lease = bench.ledger.prompts.lease(
            bench.run_id, gateway_id="g2", instance_id="i2", max_prompts=1, max_wait_s=60
        )
        found = await asyncio.wait_for(lease, SOON_S)
        assert [(x.prompt_id, x.attempt) for x in found.leases] == [(first.prompt_id, 2)]


async def test_a_new_term_ends_the_waiting_of_the_old_one(bench) -> None:
    waiting = asyncio.create_task(bench.lease_step(1, max_wait_s=60))
    await _until_listening(bench.ledger.bell, bench.run_id)
    await bench.ledger.steps.open_term(bench.run_id, consumer_id="trainer")
    with pytest.raises(errors.StaleTerm):
        await asyncio.wait_for(waiting, SOON_S)


async def test_closing_answers_those_who_wait(bench) -> None:
    waiting = asyncio.create_task(bench.lease_step(1, max_wait_s=60))
    await _until_listening(bench.ledger.bell, bench.run_id)
    await bench.ledger.bell.close()
    assert (await asyncio.wait_for(waiting, SOON_S)).pending


async def test_nothing_is_asked_again_while_nothing_changes(bench, monkeypatch) -> None:
    monkeypatch.setattr(wake, "FALLBACK_S", 3600.0)
    bell, asked, changed = bench.ledger.bell, {"v": 0, "p": 0}, set()

    async def wait_for(letter: str) -> int:
        async def ask() -> Answer[int]:
            asked[letter] += 1
            return Answer(asked[letter], letter in changed)

        return await bell.wait_for(bench.run_id, letter, ask, max_wait_s=3600)

    waiting, witness = asyncio.create_task(wait_for("v")), asyncio.create_task(wait_for("p"))
    await _until_listening(bell, bench.run_id)
    await _settle()
    before = asked["v"]
    assert before <= 2  # first, subscription made
    changed.add("p")
    await bench.put(1)  # rings p, not v
    await asyncio.wait_for(witness, SOON_S)
    await _settle()
    assert asked["v"] == before
    changed.add("v")
    await bench.publish(1)
    assert await asyncio.wait_for(waiting, SOON_S) == before + 1


async def test_a_subscription_to_a_redis_that_fell_silent_is_made_anew(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(wake, "QUIET_S", 0.05)

    async def ask() -> Answer[None]:
        return Answer(None, False)

    async with EmbeddedRedis(tmp_path) as redis, open_ledger(redis.url, redis_timeout_s=0.2) as ledger:
        waiting = asyncio.create_task(ledger.bell.wait_for("r", "v", ask, max_wait_s=60))
        await _until_listening(ledger.bell, "r")
        os.kill(redis.pid, signal.SIGSTOP)  # its connections stand, and nothing comes
        try:
            async with asyncio.timeout(SOON_S):
                while ledger.bell.is_listening("r"):  # noqa: ASYNC110  # the Bell has no event for tests
                    await asyncio.sleep(0.002)
        finally:
            os.kill(redis.pid, signal.SIGCONT)
        await _until_listening(ledger.bell, "r")
        waiting.cancel()


def test_a_connection_that_broke_between_two_calls_means_that_redis_is_away() -> None:
    store = Store(RedisLink("redis://127.0.0.1:1"))
    assert isinstance(store.translate(uvloop.run(_write_to_a_closed_connection())), errors.Unavailable)
    assert isinstance(store.translate(RuntimeError("some defect")), errors.Internal)


async def _write_to_a_closed_connection() -> Exception:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.transport.abort()
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError) as caught:
            writer.writelines([b"*1", b"PING"])
    return caught.value


async def _settle() -> None:
    """Whoever was rung has asked."""
    for _ in range(20):
        await asyncio.sleep(0)


async def _until_listening(bell: Bell, run_id: str) -> None:
    async with asyncio.timeout(SOON_S):
        while not bell.is_listening(run_id):  # noqa: ASYNC110  # the Bell has no event for tests
            await asyncio.sleep(0.002)


async def test_a_full_redis_refuses_what_grows_and_lets_go_of_what_does_not(bench) -> None:
    ids = await bench.train_step(1)
    client = bench.ledger.link.client
    await client.config_set("maxmemory", 1)
    try:
        with pytest.raises(
            errors.ResourceExhausted, match="is full: it holds more than its maxmemory"
        ) as caught:
            await bench.put(1)
        assert caught.value.reason == "REDIS_FULL"
        assert caught.value.retry_after_s
        await bench.audit()
        assert (await bench.trim(1)).freed == len(ids)
    finally:
        await client.config_set("maxmemory", 0)
    assert len(await bench.put(1)) == 1
    await bench.audit()
