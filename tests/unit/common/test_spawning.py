"""Children: their end and their signals, under both loops; and no fork handler of gRPC's runs for them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from milepost_common import spawning

DEADLINE_S = 30.0
CONTROL_S = 10.0
LONG = ("sleep", "60")
WITH_GRPC = """
import asyncio, os, subprocess, sys
import grpc, uvloop
from milepost_common import spawning

CHILD = (sys.executable, "-S", "-c", "pass")

async def start():
    if sys.argv[1] == "spawning":
        return spawning.start(*CHILD)
    if sys.argv[1] == "leashed":
        return spawning.start(*CHILD, leash=15)
    return await asyncio.create_subprocess_exec(*CHILD)

async def main():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    await channel.channel_ready()
    for _ in range(20):
        status = await (await start()).wait()
        if sys.argv[1] != "uvloop":
            assert status == 0, status
    print("done", flush=True)
    os._exit(0)

uvloop.run(main())
"""
PARENT = """
import signal, sys, time
from milepost_common import spawning
script = "echo $$ $PPID; exec sleep 60"
child = spawning.start("sh", "-c", script, leash=signal.SIGKILL, start_new_session=True)
time.sleep(60)
"""

Test = Callable[[], Coroutine[Any, Any, None]]
Run = Callable[[Test], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a test under a loop; in the end it has left no pidfd and no child."""

    def to_its_end(test: Test) -> None:
        async def timed() -> None:
            async with asyncio.timeout(DEADLINE_S):
                await test()
            assert not [link for link in _links() if "pidfd" in link]

        before = set(psutil.Process().children())
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(timed())
        assert set(psutil.Process().children()) <= before

    return to_its_end


def _links() -> list[str]:
    """What the descriptors of this process are."""
    found: list[str] = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # of the listing itself
            continue
    return found


def _block_until_ended(process: spawning.Process) -> None:
    """Waits for the end of one that ends at once, and leaves it to be reaped; the loop stands meanwhile."""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def test_this_system_has_pidfds_and_shows_them() -> None:
    descriptor = os.pidfd_open(os.getpid())
    try:
        assert [link for link in _links() if "pidfd" in link], "the other tests would see no leak"
    finally:
        os.close(descriptor)


def test_it_tells_the_exit_status(run: Run) -> None:
    async def test() -> None:
        process = spawning.start("sh", "-c", "exit 7")
        assert await process.wait() == 7
        assert process.returncode == 7
        assert await process.wait() == 7

    run(test)


def test_it_waits_for_one_that_has_ended_already(run: Run) -> None:
    async def test() -> None:
        process = spawning.start("true")
        _block_until_ended(process)
        assert await process.wait() == 0

    run(test)


@pytest.mark.parametrize("leash", [None, signal.SIGTERM])
def test_signals_end_it_and_do_nothing_afterwards(run: Run, leash: signal.Signals | None) -> None:
    async def test() -> None:
        for end, number in (("terminate", signal.SIGTERM), ("kill", signal.SIGKILL)):
            process = spawning.start(*LONG, leash=leash)
            assert process.returncode is None
            getattr(process, end)()
            assert await process.wait() == -number
            process.terminate()
            process.kill()
            process.send_signal(signal.SIGCONT)
            assert process.returncode == -number

    run(test)


def test_a_signal_to_one_that_has_just_ended_keeps_its_status(run: Run) -> None:
    async def test() -> None:
        process = spawning.start("sh", "-c", "exit 3")
        _block_until_ended(process)
        process.kill()
        assert await process.wait() == 3

    run(test)


def test_all_waiters_hear_of_the_end_and_a_cancelled_one_harms_none(run: Run) -> None:
    async def test() -> None:
        process = spawning.start(*LONG)
        waiters = [asyncio.create_task(process.wait()) for _ in range(5)]
        await asyncio.sleep(0.05)
        waiters[0].cancel()
        waiters[4].cancel()
        await asyncio.sleep(0.05)
        assert [waiter.done() for waiter in waiters] == [True, False, False, False, True]
        process.terminate()
        assert await asyncio.gather(*waiters[1:4]) == [-signal.SIGTERM] * 3
        with pytest.raises(asyncio.CancelledError):
            await waiters[0]

    run(test)


def test_looking_at_the_status_takes_it_from_no_waiter(run: Run) -> None:
    async def test() -> None:
        process = spawning.start(*LONG)
        waiter = asyncio.create_task(process.wait())
        await asyncio.sleep(0.05)
        process.kill()
        _block_until_ended(process)
        assert process.returncode == -signal.SIGKILL
        assert await waiter == -signal.SIGKILL

    run(test)


def test_many_at_once(run: Run) -> None:
    async def test() -> None:
        processes = [spawning.start("sh", "-c", f"exit {i}") for i in range(20)]
        assert await asyncio.gather(*(each.wait() for each in processes)) == list(range(20))

    run(test)


def test_it_waits_without_pidfds_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")

    async def test() -> None:
        assert await spawning.start("sh", "-c", "sleep 0.1; exit 4").wait() == 4

    run(test)


@pytest.mark.parametrize("leash", [None, signal.SIGTERM])
def test_a_program_that_is_not_there_is_an_error(leash: signal.Signals | None) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        spawning.start("no-such-program", leash=leash)


def test_a_leashed_child_is_the_program_itself_with_what_it_was_given(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        said, kept = tmp_path / "said", tmp_path / "kept"
        with said.open("wb") as out, kept.open("wb") as file:
            script = f"echo $$ $WORD; echo more >&{file.fileno()}; grep SigIgn /proc/self/status"
            process = spawning.start(
                *("bash", "-c", script),
                leash=signal.SIGTERM,
                stdout=out,
                env={"PATH": os.environ["PATH"], "WORD": "word"},
                pass_fds=(file.fileno(),),
                start_new_session=True,
            )
            assert os.getsid(process.pid) == process.pid
            assert await process.wait() == 0
        own, ignored = said.read_text().splitlines()
        assert own == f"{process.pid} word"
        assert kept.read_text() == "more\n"
        assert not int(ignored.split()[1], 16) & 1 << (signal.SIGPIPE - 1), "as Python does for itself"

    run(test)


def test_a_leashed_child_ends_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    try:
        assert parent.stdout
        assert select.select([parent.stdout], [], [], DEADLINE_S)[0]
        pid, its_parent = map(int, parent.stdout.readline().split())
        assert its_parent == parent.pid
        child = psutil.Process(pid)
    finally:
        parent.kill()
        parent.wait(DEADLINE_S)
        if parent.stdout:
            parent.stdout.close()
    child.wait(DEADLINE_S)


def test_a_leash_whose_parent_is_gone_already_starts_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", spawning.LEASH, "15", "1", "touch", str(tmp_path / "started")],
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 1
    assert not list(tmp_path.iterdir())


def _what_grpc_said(how: str, folder: Path) -> str:
    """Starts twenty children beside a live server and channel; returns what gRPC wrote of forks."""
    environ = {**os.environ, "GRPC_VERBOSITY": "INFO"}
    environ.pop("GRPC_ENABLE_FORK_SUPPORT", None)
    said, errors = folder / "said", folder / "errors"
    with said.open("wb") as out, errors.open("wb") as err:
        command = [sys.executable, "-c", WITH_GRPC, how]
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environ, start_new_session=True)
        try:
            process.wait(CONTROL_S if how == "uvloop" else DEADLINE_S)
        except subprocess.TimeoutExpired:
            assert how == "uvloop", "it hung"  # which a fork handler may well do
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(DEADLINE_S)
    assert how == "uvloop" or said.read_text() == "done\n", errors.read_text()
    return "\n".join(line for line in errors.read_text().splitlines() if "fork" in line)


@pytest.mark.parametrize("how", ["spawning", "leashed"])
def test_no_fork_handler_of_grpc_runs(how: str, tmp_path: Path) -> None:
    assert _what_grpc_said(how, tmp_path) == ""


def test_fork_handlers_of_grpc_would_be_seen(tmp_path: Path) -> None:
    assert "fork" in _what_grpc_said("uvloop", tmp_path), "the test above would pass whatever is done"
