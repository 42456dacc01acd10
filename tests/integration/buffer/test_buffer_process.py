"""The buffer as a process, with the real clients: the life of a group, kills, replicas, bad starts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import psutil
import pytest

from milepost import errors
from milepost import types as t
from milepost.channel import NO_RETRY
from milepost.client.buffer import BufferClient
from milepost.client.weights import WeightClient
from milepost.convert import open_group
from moments import Missed, caught

SOON_S = 60.0


async def test_the_life_of_a_group(driver) -> None:
    await driver.start()
    assert (await driver.buffer.get_run("run")).config.groups_per_step == 2
    await driver.put(3)
    leases = await driver.lease(3)
    assert [x.prompt.text for x in leases] == ["p0?", "p1?", "p2?"]
    assert (leases[0].min_version, leases[0].label, leases[0].num_samples) == (1, 0, 2)
    renewed = await driver.buffer.renew_leases("run", instance_id="gw-1", leases=[x.key for x in leases])
    assert renewed.lost == ()
    waiting = asyncio.create_task(driver.lease_step(1))
    assert await driver.seal(leases[:2]) == [t.SealStatus.SEALED] * 2
    step = await asyncio.wait_for(waiting, SOON_S)
    ids = tuple(g.prompt_id for g in step.groups)
    assert ids == ("p0", "p1")
    assert step.groups[0].rewards == (0.0, 1.0)
    fetched = {name: open_group(p) async for name, p in driver.buffer.fetch_groups("run", prompt_ids=ids)}
    assert list(fetched) == list(ids)
    assert [s.text for s in fetched["p1"].samples] == ["p1", "p1"]
    assert fetched["p0"].samples[1].logprobs.tolist() == [-0.5] * 6
    await driver.commit(1, ids)
    await driver.publish(1)
    assert (await driver.weights.get_version("run")).label == 1
    trimmed = await driver.buffer.trim_checkpointed("run", term=driver.term, step=1)
    assert trimmed.freed == 2
    released = await driver.buffer.release_prompts(
        "run", instance_id="gw-1", leases=[leases[2].key], drop_reason=t.DropReason.INVALID, detail="too long"
    )
    assert released.dropped == 1
    rows = [r async for r in driver.buffer.get_ledger("run")]
    assert [(r.prompt_id, r.state.name, r.detail) for r in rows] == [
        ("p0", "TRAINED", ""),
        ("p1", "TRAINED", ""),
        ("p2", "DROPPED", "too long"),
    ]
    (stats,) = await driver.buffer.get_stats()
    assert (stats.trained, stats.dropped) == (2, {"invalid": 1})
    assert await driver.buffer.close_source("run", source_id="file") == 0
    with pytest.raises(errors.OutOfRange):
        await driver.lease_step(2)
    assert (await driver.buffer.get_run("run")).finished
    report = await driver.audit()
    assert (report.accepted, report.trained, report.in_flight) == (3, 2, 0)


async def test_errors_keep_their_class_reason_and_values_on_the_wire(driver) -> None:
    with pytest.raises(errors.NotFound) as missing:
        await driver.buffer.get_run("nowhere")
    assert (missing.value.reason, missing.value.metadata["run_id"]) == ("UNKNOWN_RUN", "nowhere")
    await driver.start()
    assert driver.buffer.redis_run_id
    old = driver.term
    await driver.open_term(0)
    with pytest.raises(errors.StaleTerm) as stale:
        await driver.buffer.lease_step("run", term=old, step=1)
    assert stale.value.metadata["newest"] == str(driver.term)
    items = [t.PromptItem(prompt=t.Prompt(prompt_id=f"q{i}", text="x")) for i in range(7)]
    assert (await driver.buffer.put_prompts("run", items=items)).accepted == 6
    with pytest.raises(errors.ResourceExhausted) as full:
        await driver.buffer.put_prompts("run", items=items[6:])
    assert full.value.retry_after_s
    bad = [items[6], t.PromptItem(prompt=t.Prompt(prompt_id="q", text="x", metadata_json="["))]
    with pytest.raises(errors.InvalidArgument, match=r"items\[1\]"):
        await driver.buffer.put_prompts("run", items=bad)
    with pytest.raises(errors.AlreadyExists):
        await driver.buffer.put_prompts(
            "run", items=[t.PromptItem(prompt=t.Prompt(prompt_id="q0", text="y"))]
        )
    with pytest.raises(errors.InvalidArgument, match="max_wait"):
        await driver.buffer.lease_step("run", term=driver.term, step=1, max_wait_s=61)
    with pytest.raises(errors.Unimplemented):
        await driver.buffer.resume_consumer("run", consumer_id="follower")


async def test_a_new_trace_context_is_not_new_content(driver) -> None:
    await driver.start()
    for trace in ("00-aa-01", "00-bb-01"):
        prompt = t.Prompt(prompt_id="p", text="x", traceparent=trace)
        result = await driver.buffer.put_prompts("run", items=[t.PromptItem(prompt=prompt)])
    assert result.duplicates == 1
    (lease,) = await driver.lease(1)
    assert lease.prompt.traceparent == "00-aa-01"


async def test_payloads_come_along_with_a_lease_up_to_what_fits_a_message(driver) -> None:
    await driver.start()
    driver.tokens = 240_000  # 2 samples of 9 bytes a token: 4.3 MB, of which 8 MiB hold one
    await driver.put(2)
    await driver.seal(await driver.lease(2))
    lease = await driver.buffer.lease_step(
        "run", term=driver.term, step=1, max_wait_s=10, inline_bytes=1 << 40
    )
    fetched = [p async for _, p in driver.buffer.fetch_groups("run", prompt_ids=["p0", "p1"])]
    assert [g.prompt_id for g in lease.groups] == ["p0", "p1"]
    assert list(lease.payloads) == fetched[:1]


async def test_payloads_of_several_mib_are_streamed_in_pieces(driver) -> None:
    await driver.start()
    driver.tokens = 150_000  # 2 samples of 9 bytes a token: 2.7 MB
    await driver.train_step(1)
    sizes = {n: len(p) async for n, p in driver.buffer.fetch_groups("run", prompt_ids=["p1", "p0"])}
    assert list(sizes) == ["p1", "p0"]
    assert min(sizes.values()) > 2_600_000
    with pytest.raises(errors.NotFound, match="never-put"):
        [x async for x in driver.buffer.fetch_groups("run", prompt_ids=["p0", "never-put"])]


def is_running(pid: int) -> bool:
    """False too for a process that has ended and that nobody has waited for yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_kill_9_of_the_buffer_loses_nothing_and_takes_its_redis_along(driver, buffer_process) -> None:
    await driver.start()
    first = await driver.train_step(1)
    await driver.put(4)
    leases = await driver.lease(4)
    await driver.seal(leases[:2])
    before = driver.buffer.redis_run_id
    redis_pid = await buffer_process.redis_pid()
    await buffer_process.kill()
    feeding = asyncio.create_task(driver.put(1))  # retried by the client until the buffer is back
    await buffer_process.start()
    async with asyncio.timeout(SOON_S):
        while is_running(redis_pid):  # noqa: ASYNC110  # another process sets no event
            await asyncio.sleep(0.01)
    await asyncio.wait_for(feeding, SOON_S)
    assert driver.buffer.redis_run_id != before
    assert await driver.seal(leases[:3]) == [t.SealStatus.DUPLICATE] * 2 + [t.SealStatus.SEALED]
    second = tuple(g.prompt_id for g in (await driver.lease_step(2)).groups)
    await driver.commit(2, second)
    await driver.open_term(0)
    for step, ids in ((1, first), (2, second)):
        assert tuple(g.prompt_id for g in (await driver.lease_step(step)).groups) == ids
        await driver.commit(step, ids)
    report = await driver.audit()
    assert (report.accepted, report.trained) == (7, 4)


async def test_kill_9_of_the_embedded_redis_loses_nothing(driver, buffer_process) -> None:
    await driver.start()
    await driver.train_step(1)
    stop = asyncio.Event()

    async def feed_and_train() -> None:
        step = 2
        while not stop.is_set():
            await driver.train_step(step)
            step += 1

    work = asyncio.create_task(feed_and_train())
    run_ids = {driver.buffer.redis_run_id}
    for _ in range(3):
        os.kill(await buffer_process.redis_pid(), signal.SIGKILL)
        async with asyncio.timeout(SOON_S):
            while driver.buffer.redis_run_id in run_ids and not work.done():  # noqa: ASYNC110  # a reply sets it
                await asyncio.sleep(0.02)  # until the next reply comes from the new Redis
        run_ids.add(driver.buffer.redis_run_id)
    stop.set()
    await asyncio.wait_for(work, SOON_S)
    assert len(run_ids) == 4
    report = await driver.audit()
    assert report.trained == report.accepted == len(driver.accepted)


async def test_calls_fail_unavailable_while_redis_is_away(driver, buffer_process) -> None:
    await driver.start()
    async with BufferClient(buffer_process.address, retry=NO_RETRY) as impatient:

        async def ask_until_it_fails() -> None:
            while True:
                for redis in buffer_process.redis():  # each time: it may be back before anybody asks
                    with contextlib.suppress(psutil.NoSuchProcess):
                        redis.kill()
                await impatient.get_stats("run")

        with pytest.raises(errors.Unavailable, match="redis"):
            await asyncio.wait_for(ask_until_it_fails(), SOON_S)
    assert (await driver.buffer.get_stats("run"))[0].run_id == "run"


async def test_a_suspended_redis_is_killed_and_started_again(make_process) -> None:
    process = make_process("watched", "--redis_timeout_s", "0.5", "--redis_liveness_timeout_s", "1.5")
    await process.start()

    async def ask_a_suspended_one() -> tuple[str, int, errors.MilepostError]:
        await patient.get_run("run")
        before = patient.redis_run_id
        for redis in process.redis():
            with contextlib.suppress(psutil.NoSuchProcess):
                redis.suspend()
                try:
                    await impatient.get_run("run")
                except errors.MilepostError as error:
                    return before, redis.pid, error
        raise Missed  # it was killed and started again before the call came

    try:
        async with (
            BufferClient(process.address) as patient,
            BufferClient(process.address, retry=NO_RETRY) as impatient,
        ):
            await patient.create_run("run", config=t.RunConfig(groups_per_step=2, samples_per_prompt=2))
            before, pid, failure = await caught("a call to a suspended Redis", ask_a_suspended_one)
            assert isinstance(failure, errors.Unavailable)
            assert "redis" in str(failure)
            async with asyncio.timeout(SOON_S):
                while impatient.redis_run_id in ("", before):
                    with contextlib.suppress(errors.Unavailable):
                        await impatient.get_run("run")
            assert not is_running(pid)
    finally:
        await process.stop()


async def test_a_suspended_redis_whose_buffer_was_killed_makes_room(driver, buffer_process) -> None:
    await driver.start()
    pid = await buffer_process.redis_pid()
    os.kill(pid, signal.SIGSTOP)
    await buffer_process.kill()
    assert is_running(pid)
    await buffer_process.start()
    assert not is_running(pid)
    assert (await driver.buffer.get_stats("run"))[0].run_id == "run"


async def test_replicas_share_one_redis(driver, buffer_process, make_process) -> None:
    await driver.start()
    replica = make_process("unused", "--redis_url", f"unix://{buffer_process.socket}")
    await replica.start()
    try:
        async with BufferClient(replica.address) as buffer, WeightClient(replica.address) as weights:
            versions = weights.watch_versions("run", after_version=1, max_wait_s=20)
            seen = asyncio.create_task(anext(versions))
            waiting = asyncio.create_task(buffer.lease_step("run", term=driver.term, step=1, max_wait_s=20))
            await driver.put(2)
            await driver.seal(await driver.lease(2))
            assert len((await asyncio.wait_for(waiting, SOON_S)).groups) == 2
            await driver.commit(1, ("p0", "p1"))
            await driver.publish(1)
            assert (await asyncio.wait_for(seen, SOON_S)).label == 1
            await versions.aclose()
            assert (await buffer.get_run("run")).committed_step == 1
            assert buffer.redis_run_id == driver.buffer.redis_run_id
    finally:
        await replica.stop()


async def test_sigterm_answers_those_who_wait_and_ends_with_0(driver, buffer_process) -> None:
    await driver.start()
    waiting = asyncio.create_task(driver.buffer.lease_step("run", term=driver.term, step=1, max_wait_s=60))
    async with asyncio.timeout(SOON_S):
        while not (await driver.buffer.get_stats("run"))[0].term:
            pass
    redis_pid = await buffer_process.redis_pid()
    status, said = await asyncio.wait_for(buffer_process.stop(), SOON_S)
    assert status == 0, said
    assert not os.path.exists(f"/proc/{redis_pid}")  # noqa: ASYNC240  # not a file
    waiting.cancel()


async def test_a_data_dir_serves_one_buffer(buffer_process) -> None:
    second = type(buffer_process)(buffer_process.folder, ("--redis_wait_s", "0.1"))
    await second.launch()
    status, said = await second.finish()
    assert status == 1
    assert "data_dir" in said
    assert "another buffer uses it" in said


@pytest.mark.parametrize(
    "flags, status, named",
    [
        (("--redis_url", "unix:///nowhere/redis.sock", "--redis_wait_s", "0.2"), 1, "redis_url"),
        (("--redis_ulr", "x"), 2, "redis_url"),
        (("--appendfsync", "never"), 2, "appendfsync"),
        (("--listen", "192.0.2.1:7101"), 1, "listen = 192.0.2.1:7101"),
    ],
)
async def test_bad_starts_name_the_setting(make_process, flags, status, named) -> None:
    bad = make_process("bad", *flags)
    await bad.launch()
    got, said = await bad.finish()
    assert (got, named in said) == (status, True), said


async def test_a_redis_without_aof_is_refused_by_the_process(make_process, buffer_process) -> None:
    from redis.asyncio import Redis

    client = Redis(unix_socket_path=str(buffer_process.socket))
    await client.config_set("appendonly", "no")
    await client.aclose()
    careless = ("--redis_url", f"unix://{buffer_process.socket}")
    refused = make_process("x", *careless)
    await refused.launch()
    status, said = await refused.finish()
    assert status == 1
    assert "appendonly" in said
    assert "require_aof" in said
    accepted = make_process("x", *careless, "--no-require_aof")
    await accepted.start()
    assert (await accepted.stop())[0] == 0
