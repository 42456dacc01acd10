"""The supervisor over real processes: order, restarts, the end, and no orphans."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from milepost_common.up.policy import RestartPolicy
from milepost_common.up.spec import Addresses, ChildSpec
from milepost_common.up.supervisor import Supervisor

from .conftest import DEADLINE_S, STAND_IN, Start, alive, until

POLICY = RestartPolicy(first_delay_s=0.05, max_delay_s=0.2, crash_limit=3)


class Stage:
    """A supervisor, what it reported, and the journals of its stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reported: list[str] = []
        self.supervisor: Supervisor | None = None
        self.task: asyncio.Task[int] | None = None

    def spec(self, name: str, *words: str, same_port: bool = False, **options: Any) -> ChildSpec:
        def command(at: Addresses) -> list[str]:
            own = at[name].get("grpc") if same_port else None
            listen = ["--listen", own] if own else []
            return [sys.executable, str(STAND_IN), name, str(self.folder), *words, *listen]

        return ChildSpec(name=name, command=command, **options)

    def start(self, *specs: ChildSpec, **options: Any) -> None:
        self.supervisor = Supervisor(
            specs, run_dir=self.folder / "run", policy=POLICY, report=self.reported.append, **options
        )
        self.task = asyncio.create_task(self.supervisor.run())

    async def result(self) -> int:
        assert self.task
        return await asyncio.wait_for(asyncio.shield(self.task), DEADLINE_S)

    def journal(self, name: str) -> list[str]:
        path = self.folder / f"{name}.journal"
        return path.read_text().splitlines() if path.exists() else []

    def pids(self, name: str, word: str = "start") -> list[int]:
        return [int(line.split()[1]) for line in self.journal(name) if line.startswith(word + " ")]

    def state(self) -> dict[str, Any]:
        path = self.folder / "run" / "up.json"
        return json.loads(path.read_text())["services"] if path.exists() else {}

    def is_in(self, name: str, phase: str) -> Callable[[], bool]:
        return lambda: self.state().get(name, {}).get("state") == phase

    def order_of(self, word: str) -> list[str]:
        """Names in the order in which they were reported in a phase."""
        return [line.split()[1] for line in self.reported if line.split()[2] == word]


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    if stage.task and not stage.task.done():
        assert stage.supervisor
        stage.supervisor.interrupt()
        stage.supervisor.interrupt()
        await stage.result()


async def test_children_start_when_what_they_need_is_ready_and_stop_in_order(stage: Stage) -> None:
    stage.start(
        stage.spec("c", "ready", needs=("b",), stop_rank=0),
        stage.spec("b", "ready", needs=("a",), stop_rank=1),
        stage.spec("a", "ready", stop_rank=2),
    )
    await until(stage.is_in("c", "ready"))
    assert stage.order_of("ready") == ["a", "b", "c"]
    pids = [p for name in "abc" for p in stage.pids(name)]
    assert [stage.state()[name]["pid"] for name in "abc"] == pids
    assert stage.supervisor
    stage.supervisor.interrupt()
    assert await stage.result() == 130
    assert stage.order_of("stopped") == ["c", "b", "a"]
    assert all(stage.journal(name)[-1] == "stop" for name in "abc")
    assert not any(map(alive, pids))


async def test_what_is_needed_and_never_ready_starts_nothing(stage: Stage) -> None:
    stage.start(stage.spec("a"), stage.spec("b", "ready", needs=("a",)))
    await until(lambda: stage.journal("a"))
    assert stage.supervisor
    stage.supervisor.interrupt()
    assert await stage.result() == 130
    assert not stage.journal("b")


async def test_a_killed_child_comes_back_on_its_port(stage: Stage) -> None:
    stage.start(stage.spec("a", "ready", same_port=True))
    await until(stage.is_in("a", "ready"))
    first = stage.pids("a")[0]
    os.kill(first, signal.SIGKILL)
    await until(lambda: len(stage.pids("a", "listen")) == 2)
    await until(stage.is_in("a", "ready"))
    assert stage.pids("a", "listen")[0] == stage.pids("a", "listen")[1]
    assert stage.state()["a"]["starts"] == 2
    assert any("killed by signal 9" in line for line in stage.reported)


async def test_leftovers_of_a_dead_child_are_ended_before_it_comes_back(stage: Stage) -> None:
    stage.start(stage.spec("a", "child", "ready"))
    await until(stage.is_in("a", "ready"))
    grandchild = stage.pids("a", "grandchild")[0]
    os.kill(stage.pids("a")[0], signal.SIGKILL)
    await until(lambda: len(stage.pids("a")) == 2)
    assert not alive(grandchild)


async def test_a_child_that_keeps_dying_ends_everything_and_shows_its_log(stage: Stage) -> None:
    stage.start(stage.spec("good", "ready"), stage.spec("bad", "exit=7", needs=("good",)))
    assert await stage.result() == 1
    assert len(stage.pids("bad")) == POLICY.crash_limit
    assert any("bad says hello" in line for line in stage.reported)
    assert not alive(stage.pids("good")[0])


async def test_a_child_with_bad_settings_is_not_tried_again(stage: Stage) -> None:
    stage.start(stage.spec("bad", "exit=2"))
    assert await stage.result() == 1
    assert len(stage.pids("bad")) == 1


async def test_a_program_that_is_not_there_is_a_failure(stage: Stage) -> None:
    stage.start(ChildSpec(name="ghost", command=lambda _: ["/nonexistent/program"]))
    assert await stage.result() == 1
    assert any("cannot start /nonexistent/program" in line for line in stage.reported)


async def test_a_child_that_never_gets_ready_is_started_again(stage: Stage) -> None:
    stage.start(stage.spec("slow", "deaf", ready_timeout_s=0.3))
    assert await stage.result() == 1
    assert stage.state()["slow"]["starts"] == POLICY.crash_limit
    assert sum("slow" in line and "not ready after" in line for line in stage.reported) == POLICY.crash_limit
    assert not any(map(alive, stage.pids("slow")))


async def test_the_end_of_the_run_stops_everything_with_status_0(stage: Stage) -> None:
    done = frozenset((0,))
    stage.start(
        stage.spec("a", "ready", stop_rank=1),
        stage.spec("t", "ready", "once-exit=3", "exit=0", needs=("a",), final_codes=done, ends_run={0: 0}),
    )
    assert await stage.result() == 0
    assert stage.state()["t"] == stage.state()["t"] | {"state": "done", "exit_code": 0, "pid": None}
    assert stage.journal("a")[-1] == "stop"


async def test_a_final_status_may_end_the_run_as_a_failure(stage: Stage) -> None:
    codes = {"final_codes": frozenset((0, 4)), "ends_run": {0: 0, 4: 1}}
    spec = stage.spec("t", "ready", "exit=4", needs=("a",), **codes)
    stage.start(stage.spec("a", "ready", stop_rank=1), spec)
    assert await stage.result() == 1
    assert stage.journal("a")[-1] == "stop"
    assert any("last lines of" in line for line in stage.reported)


async def test_a_final_status_that_ends_nothing_leaves_the_others_alone(stage: Stage) -> None:
    spec = stage.spec("t", "ready", "exit=3", final_codes=frozenset((0, 3)), ends_run={0: 0})
    stage.start(stage.spec("a", "ready"), spec)
    await until(stage.is_in("t", "done"))
    await until(stage.is_in("a", "ready"))
    assert len(stage.pids("t")) == 1
    assert alive(stage.pids("a")[0])


async def test_with_stay_the_others_go_on(stage: Stage) -> None:
    spec = stage.spec("t", "ready", "exit=0", final_codes=frozenset((0,)), ends_run={0: 0})
    stage.start(stage.spec("a", "ready"), spec, stay=True)
    await until(stage.is_in("t", "done"))
    await until(stage.is_in("a", "ready"))
    assert alive(stage.pids("a")[0])


async def test_a_suspended_service_is_killed_and_comes_back_on_its_port(stage: Stage) -> None:
    def command(at: Addresses) -> list[str]:
        head = [sys.executable, "-m", "milepost_router", "serve", "--buffer", ""]
        own = at["router"]
        return [
            *head,
            *("--listen", own.get("grpc", "127.0.0.1:0")),
            *("--http_listen", own.get("http", "127.0.0.1:0")),
        ]

    stage.start(ChildSpec(name="router", command=command, liveness_timeout_s=6.0))
    await until(stage.is_in("router", "ready"))
    before = stage.state()["router"]
    os.kill(before["pid"], signal.SIGSTOP)
    await until(lambda: stage.state()["router"]["starts"] == 2)
    await until(stage.is_in("router", "ready"))
    assert not alive(before["pid"])
    assert stage.state()["router"]["addresses"] == before["addresses"]
    assert any("no answer to its health check for 6 s: killed" in line for line in stage.reported)


async def test_a_service_that_listens_but_never_answers_is_killed(stage: Stage) -> None:
    stage.start(stage.spec("stuck", "ready", same_port=True, liveness_timeout_s=0.3))
    await until(lambda: len(stage.pids("stuck")) >= 2)
    assert not alive(stage.pids("stuck")[0])


async def test_without_a_limit_nobody_is_looked_at(stage: Stage) -> None:
    stage.start(
        stage.spec("stuck", "ready"), stage.spec("watched", "ready", same_port=True, liveness_timeout_s=0.3)
    )
    await until(lambda: len(stage.pids("watched")) >= 2)
    assert len(stage.pids("stuck")) == 1


async def test_a_suspended_child_is_woken_to_stop(stage: Stage) -> None:
    stage.start(stage.spec("a", "ready", stop_timeout_s=3600.0))
    await until(stage.is_in("a", "ready"))
    os.kill(stage.pids("a")[0], signal.SIGSTOP)
    assert stage.supervisor
    stage.supervisor.interrupt()
    assert await stage.result() == 130
    assert stage.journal("a")[-1] == "stop"


async def test_a_deaf_child_is_killed_after_its_deadline_with_its_grandchildren(stage: Stage) -> None:
    stage.start(stage.spec("a", "deaf", "child", "ready", stop_timeout_s=0.3))
    await until(stage.is_in("a", "ready"))
    assert stage.supervisor
    stage.supervisor.interrupt()
    assert await stage.result() == 130
    assert not any(map(alive, stage.pids("a") + stage.pids("a", "grandchild")))
    assert any("not stopped after" in line for line in stage.reported)


async def test_a_second_interrupt_waits_for_nobody(stage: Stage) -> None:
    stage.start(stage.spec("a", "deaf", "ready", stop_timeout_s=3600.0))
    await until(stage.is_in("a", "ready"))
    assert stage.supervisor
    stage.supervisor.interrupt()
    await until(stage.is_in("a", "stopping"))
    stage.supervisor.interrupt()
    assert await stage.result() == 130


async def test_no_child_outlives_a_supervisor_that_is_killed(stage: Stage, start: Start) -> None:
    program = f"""
import asyncio, sys
from pathlib import Path
from milepost_common.up.policy import RestartPolicy
from milepost_common.up.spec import ChildSpec
from milepost_common.up.supervisor import Supervisor
folder = {str(stage.folder)!r}
spec = ChildSpec(name="a", command=lambda _: [sys.executable, {str(STAND_IN)!r}, "a", folder, "ready"])
asyncio.run(Supervisor([spec], run_dir=Path(folder) / "run", policy=RestartPolicy(), report=print).run())
"""
    owner = await start(sys.executable, "-c", program)
    await until(stage.is_in("a", "ready"))
    pid = stage.pids("a")[0]
    assert alive(pid)
    owner.kill()
    await until(lambda: not alive(pid), what="the child ends with its owner")
