"""The feeder against a real buffer: exact resume, bad lines, credits, crashes on either side."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from milepost import BufferClient, RunConfig
from milepost.errors import FailedPrecondition, NotFound, ResourceExhausted
from milepost.feed import Feeder, FeedOptions, FeedProgress
from milepost.types import PromptState

from .conftest import DEADLINE_S, Buffer, Start, until

WIDE = RunConfig(groups_per_step=512, samples_per_prompt=1, max_staleness=0)
PATIENT = FeedOptions(run_id="r", credit_wait_s=0.2)
NARROW = RunConfig(groups_per_step=4, samples_per_prompt=1, max_staleness=0)


def write(path: Path, num_prompts: int, *, bad: Sequence[int] = ()) -> Path:
    lines = ["rubbish" if i in bad else json.dumps({"prompt": f"{i}+1="}) for i in range(num_prompts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def expected(num_prompts: int, *, epochs: int = 1, bad: Sequence[int] = ()) -> list[str]:
    return [f"data/{e}/{i}" for e in range(epochs) for i in range(num_prompts) if i not in bad]


async def in_ledger(client: BufferClient, *, state: PromptState | None = None) -> list[str]:
    """Ids in order of acceptance."""
    states = [state] if state else []
    return [row.prompt_id async for row in client.get_ledger("r", states=states)]


async def take(client: BufferClient) -> None:
    """Makes room: drops what waits."""
    if waiting := await in_ledger(client, state=PromptState.WAITING):
        await client.cancel_prompts("r", prompt_ids=waiting)


async def finish(task: asyncio.Task[FeedProgress], client: BufferClient) -> FeedProgress:
    """Makes room again and again until the feeder is done."""
    async with asyncio.timeout(60):
        while not task.done():
            await take(client)
            await asyncio.wait([task], timeout=0.05)
    return task.result()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", 40)


async def test_every_line_of_every_epoch_in_order_and_the_source_is_closed(
    buffer: Buffer, data: Path
) -> None:
    accepted: list[str] = []
    async with buffer.client() as client:
        await client.create_run("r", config=WIDE)
        options = FeedOptions(run_id="r", epochs=3, batch=7)
        done = await Feeder(data, buffer=buffer.address, options=options, on_accepted=accepted.extend).run()
        assert done.finished
        assert (done.accepted, done.skipped, done.duplicates) == (120, 0, 0)
        assert await in_ledger(client) == accepted == expected(40, epochs=3)
        assert (await client.get_stats("r"))[0].open_sources == 0
        again = await Feeder(data, buffer=buffer.address, options=options).run()
        assert (again.finished, again.accepted) == (True, 0)


async def test_a_feeder_that_is_stopped_anywhere_goes_on_where_it_stood(buffer: Buffer, data: Path) -> None:
    async with buffer.client() as client:
        await client.create_run("r", config=NARROW)
        rounds = 0
        while len(await in_ledger(client)) < 33:
            task = asyncio.create_task(
                Feeder(data, buffer=buffer.address, options=FeedOptions(run_id="r", batch=5)).run()
            )
            before = len(await in_ledger(client))
            async with asyncio.timeout(60):
                while len(await in_ledger(client)) < before + 6:
                    await asyncio.sleep(0.01)
                    await take(client)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            rounds += 1
        assert rounds >= 3
        last = asyncio.create_task(Feeder(data, buffer=buffer.address, options=FeedOptions(run_id="r")).run())
        done = await finish(last, client)
        assert await in_ledger(client) == expected(40)
        assert done.accepted < 40


async def test_bad_lines_are_named_and_skipped(buffer: Buffer, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [
        '{"prompt": "a"}',
        "rubbish",
        "",
        '{"prompt_id": "x", "prompt": "b"}',
        '{"prompt_id": "x", "prompt": "c"}',
        '{"promt": "d"}',
        '{"prompt": "e"}',
    ]
    path.write_text("\n".join(lines))
    bad: dict[int, str] = {}
    async with buffer.client() as client:
        await client.create_run("r", config=WIDE)
        feeder = Feeder(
            path,
            buffer=buffer.address,
            options=FeedOptions(run_id="r"),
            on_bad_line=lambda number, error: bad.update({number: str(error)}),
        )
        done = await feeder.run()
        assert (done.accepted, done.skipped) == (3, 3)
        assert sorted(bad) == [2, 5, 6]
        assert "did you mean 'prompt'" in bad[6]
        assert "other content" in bad[5]
        assert await in_ledger(client) == ["data/0/0", "x", "data/0/6"]


async def test_ids_of_their_own_are_told_apart_by_epoch(buffer: Buffer, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt_id": "x", "prompt": "a"}\n')
    async with buffer.client() as client:
        await client.create_run("r", config=WIDE)
        await Feeder(path, buffer=buffer.address, options=FeedOptions(run_id="r", epochs=2)).run()
        assert await in_ledger(client) == ["x", "x/1"]


async def test_it_waits_for_the_run_and_gives_up_in_time(buffer: Buffer, data: Path) -> None:
    told: list[str] = []
    feeder = Feeder(
        data,
        buffer=buffer.address,
        options=FeedOptions(run_id="r", wait_s=DEADLINE_S),
        on_progress=lambda p: told.append(p.waiting_for),
    )
    task = asyncio.create_task(feeder.run())
    await until(lambda: any("run r, which is not there yet" in t for t in told))
    async with buffer.client() as client:
        await client.create_run("r", config=WIDE)
    assert (await asyncio.wait_for(task, DEADLINE_S)).accepted == 40
    with pytest.raises(NotFound, match="waited 0 s"):
        await Feeder(data, buffer=buffer.address, options=FeedOptions(run_id="other", wait_s=0.2)).run()


@pytest.mark.parametrize("stall_s", [0.0, 0.5])
async def test_without_credits_it_waits_and_says_so(buffer: Buffer, data: Path, stall_s: float) -> None:
    told: list[str] = []
    async with buffer.client() as client:
        await client.create_run("r", config=NARROW)
        options = FeedOptions(run_id="r", stall_s=stall_s, credit_wait_s=0.1)
        feeder = Feeder(
            data, buffer=buffer.address, options=options, on_progress=lambda p: told.append(p.waiting_for)
        )
        with pytest.raises(ResourceExhausted):
            await feeder.run()
        assert "waiting for credits" in told
        assert len(await in_ledger(client)) == 8


async def test_another_content_under_the_same_name_is_refused(buffer: Buffer, data: Path) -> None:
    async with buffer.client() as client:
        await client.create_run("r", config=WIDE)
    options = FeedOptions(run_id="r", keep_open=True)
    await Feeder(data, buffer=buffer.address, options=options).run()
    write(data, 41)
    with pytest.raises(FailedPrecondition, match="digest"):
        await Feeder(data, buffer=buffer.address, options=options).run()


async def test_a_growing_file_is_followed(buffer: Buffer, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"')
    accepted: list[str] = []
    async with buffer.client() as client:
        await client.create_run("r", config=WIDE)
        options = FeedOptions(run_id="r", follow=True)
        task = asyncio.create_task(
            Feeder(path, buffer=buffer.address, options=options, on_accepted=accepted.extend).run()
        )
        await until(lambda: accepted == ["data/0/0"])
        with path.open("a") as file:
            file.write('}\n{"prompt": "c"}\n')
        await until(lambda: accepted == ["data/0/0", "data/0/1", "data/0/2"])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_buffer_that_is_killed_in_between_loses_nothing(buffer: Buffer, data: Path) -> None:
    told: list[str] = []
    async with buffer.client() as client:
        await client.create_run("r", config=NARROW)
    feeder = Feeder(
        data,
        buffer=buffer.address,
        options=PATIENT,
        on_progress=lambda p: told.append(p.waiting_for),
    )
    task = asyncio.create_task(feeder.run())
    await until(lambda: "waiting for credits" in told)
    await buffer.kill()
    await until(lambda: any("does not answer" in t for t in told))
    await buffer.start()
    async with buffer.client() as client:
        await finish(task, client)
        assert await in_ledger(client) == expected(40)


async def test_a_redis_that_forgot_everything_is_told_again(buffer: Buffer, data: Path) -> None:
    told: list[str] = []
    async with buffer.client() as client:
        await client.create_run("r", config=NARROW)
    feeder = Feeder(
        data,
        buffer=buffer.address,
        options=PATIENT,
        on_progress=lambda p: told.append(p.waiting_for),
    )
    task = asyncio.create_task(feeder.run())
    await until(lambda: "waiting for credits" in told)
    await buffer.kill()
    shutil.rmtree(buffer.data_dir)
    await buffer.start()
    async with buffer.client() as client:
        await client.create_run("r", config=NARROW)
        await finish(task, client)
        assert await in_ledger(client) == expected(40)


async def test_the_command_witnesses_what_was_accepted_and_the_audit_believes_it(
    buffer: Buffer, milepost: Start, tmp_path: Path
) -> None:
    path, witness = write(tmp_path / "data.jsonl", 20, bad=(3,)), tmp_path / "acknowledged.jsonl"
    where = ("--run", "r", "--buffer", buffer.address)
    async with buffer.client() as client:
        await client.create_run("r", config=NARROW)
        feed = await milepost("feed", path, *where, "--acknowledged", witness, "--batch", "3")
        await until(lambda: witness.exists() and witness.read_text().count("data/0/") >= 8)
        feed.send_signal(signal.SIGKILL)
        await feed.communicate()
        feed = await milepost("feed", path, *where, "--acknowledged", witness, "--batch", "3")
        async with asyncio.timeout(60):
            reading = asyncio.create_task(feed.communicate())
            while not reading.done():
                await take(client)
                await asyncio.wait([reading], timeout=0.05)
        out, err = reading.result()
        assert feed.returncode == 0, err  # the bad line came before the cursor, and was reported before
        assert b"fed 11 prompts" in out
        told = [i for line in witness.read_text().splitlines() for i in json.loads(line)["accepted"]]
        assert told == expected(20, bad=(3,)) == await in_ledger(client)
    audit = await milepost("ledger", "--audit", "--witness", witness, *where)
    out, err = await audit.communicate()
    assert audit.returncode == 0, (out, err)
    assert b"lost 0, twice 0" in out
    assert b"the audit closes" in out
    with witness.open("a") as file:
        file.write('{"run_id": "r", "accepted": ["data/0/999"]}\n')
    audit = await milepost("ledger", "--audit", "--witness", witness, "--json", *where)
    out, err = await audit.communicate()
    assert audit.returncode == 1, err
    report = json.loads(out)
    assert report["lost"] == 1
    assert any("data/0/999" in p for p in report["problems"])


async def test_rows_can_be_read_by_people_and_programs(buffer: Buffer, milepost: Start, data: Path) -> None:
    where = ("--run", "r", "--buffer", buffer.address)
    async with buffer.client() as client:
        await client.create_run("r", config=WIDE)
    feed = await milepost("feed", data, *where)
    await feed.communicate()
    assert feed.returncode == 0
    table, _ = await (await milepost("ledger", *where, "--state", "waiting", "--limit", "3")).communicate()
    assert b"data/0/39" in table
    assert b"data/0/36" not in table
    assert b"the last 3 of 40 rows" in table
    assert b"accepted 40: waiting 40" in table
    raw, _ = await (await milepost("ledger", *where, "--json", "--prompt", "data/0/7")).communicate()
    assert [(r["prompt_id"], r["state"]) for r in json.loads(raw)["rows"]] == [("data/0/7", "waiting")]
    _, err = await (await milepost("ledger", "--run", "none", "--buffer", buffer.address)).communicate()
    assert b"no such run" in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_ctrl_c_and_sigterm_end_a_feeder_in_order(
    buffer: Buffer, milepost: Start, data: Path, number: signal.Signals, status: int
) -> None:
    feed = await milepost("feed", data, "--run", "none", "--buffer", buffer.address)
    line = await asyncio.wait_for(feed.stderr.readline(), DEADLINE_S)
    assert b"which is not there yet" in line
    feed.send_signal(number)
    await asyncio.wait_for(feed.communicate(), DEADLINE_S)
    assert feed.returncode == status


async def test_sigterm_ends_a_feeder_that_a_shell_put_into_the_background(
    buffer: Buffer, start: Start, data: Path
) -> None:
    """A shell without job control has its background jobs ignore Ctrl-C; SIGTERM is another matter."""
    words = (sys.executable, "-m", "milepost.cli", "feed", data, "--run", "none", "--buffer", buffer.address)
    feed = await start("sh", "-c", 'trap "" INT; exec "$0" "$@"', *words)
    line = await asyncio.wait_for(feed.stderr.readline(), DEADLINE_S)
    assert b"which is not there yet" in line
    feed.send_signal(signal.SIGINT)
    feed.send_signal(signal.SIGTERM)
    await asyncio.wait_for(feed.communicate(), DEADLINE_S)
    assert feed.returncode == 143
