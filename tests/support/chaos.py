"""Faults for a running stack: who is hit, when, with which signal, and how long it may take to go on.

    Siege.start ──> rows: hit(victim, signal, moment) ──> goes_on() ──> ... ──> finish() ──> the judges

`Siege` owns the stack, its feeder and doubles. One that did not recover is broken: later rows fail at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from bystander import Bystander
from milepost import BufferClient, RouterClient
from milepost.channel import NO_RETRY
from milepost.cli.health import check
from milepost.errors import MilepostError
from milepost.types import EngineState, PromptState, RunStats
from milepost_common.up.readiness import parse_readiness
from stack import MILEPOST, Stack, until

VICTIMS = ("trainer", "rollout", "router", "engine-0", "buffer", "redis")
HELD_ENGINE = "engine-1"
ROUTER_LEASE_S = 6.0  # milepost_router.ledger.LEASE_TTL_S: a killed router's claim on the run
FIRST_STEP_S = 240.0

REWARD = """
import time


def even_digits(sample):
    time.sleep(0.05)  # a reward takes its time: groups are in flight at every instant
    return sum(c in "02468" for c in sample.response) / max(1, len(sample.response))
"""


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """The waits that a fault may cost, as the configuration of the stack sets them."""

    liveness_s: float = 4.5
    redis_liveness_s: float = 4.0
    ready_s: float = 180.0
    lease_ttl_s: float = 3.0
    sample_s: float = 20.0
    publish_s: float = 12.0
    retry_s: float = 0.3
    call_s: float = 2.0
    bucket_s: float = 4.0
    restart_s: float = 10.0  # RestartPolicy.max_delay_s

    def recovery_s(self, victim: str, number: signal.Signals) -> float:
        """Longest time from a fault until two more steps are trained and published.

        The worst case is a sum: the fault is noticed, the process comes back, what it held runs out, and a
        transaction and a sample that were under way run into their deadlines once.
        """
        noticed = self.liveness_s if number is signal.SIGSTOP else 0.0
        if victim == "redis":
            noticed = self.redis_liveness_s if number is signal.SIGSTOP else 0.0
        back = self.restart_s + self.ready_s
        held = {"rollout": self.lease_ttl_s, "router": ROUTER_LEASE_S}.get(victim, 0.0)
        return noticed + back + held + self.publish_s + self.sample_s

    def tables(self, *, transport: str, folder: Path) -> dict[str, Any]:
        """The configuration: tables by the names that `Stack.launch` wants."""
        return {
            "run": {"lease_ttl_s": self.lease_ttl_s, "reward": "grades:even_digits"},
            "run__sampling": {"temperature": 1.0, "max_new_tokens": 24, "ignore_eos": True},
            "up": {
                "liveness_timeout_s": self.liveness_s,
                "ready_timeout_s": self.ready_s,
                "crash_limit": 50,  # faults come faster than in a life
                "stop_timeout_s": 20.0,
            },
            "buffer": {"redis_timeout_s": self.call_s, "redis_liveness_timeout_s": self.redis_liveness_s},
            "router": {
                "probe_interval_s": 0.3,
                "probe_timeout_s": self.call_s,
                "engine_call_timeout_s": self.call_s,
                "bucket_timeout_s": self.bucket_s,
                "transaction_timeout_s": self.publish_s,
                "commit_wait_s": self.call_s,
                "ledger_timeout_s": self.call_s,
                "admit_wait_s": self.call_s,
                "quarantine_s": 0.3,
                "quarantine_max_s": 2.0,
            },
            "rollout": {"sample_timeout_s": self.sample_s, "reward_path": [str(folder)]},
            "engine": {"group_timeout_s": self.bucket_s, "transfer_timeout_s": self.bucket_s},
            "trainer": {"lease_wait_s": self.call_s},
            "trainer__optimizer": {"lr": 3e-3},
            "trainer__checkpoint": {"every": 1, "keep": 1_000_000},  # every label's weights, every payload
            "trainer__publish": {
                "transport": transport,
                "bucket_bytes": 1,  # each tensor travels alone: a transaction takes long enough to be caught
                "timeout_s": self.publish_s,
                "retry_delay_s": self.retry_s,
            },
        }


@dataclass
class Siege:
    """A stack that is shot at, its feeder, and what was seen."""

    stack: Stack
    deadlines: Deadlines
    model: Path
    feeder: subprocess.Popen[bytes] | None = None
    doubles: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])
    bystander: Bystander | None = None
    broken: str = ""
    took_s: dict[str, float] = field(default_factory=dict[str, float])

    @classmethod
    def start(cls, run_dir: Path, model: Path, prompts: Path, *, transport: str) -> Siege:
        """Starts a stack and feeds it more prompts than it can train."""
        deadlines = Deadlines()
        run_dir.parent.joinpath("grades.py").write_text(REWARD)
        tables = deadlines.tables(transport=transport, folder=run_dir.parent)
        stack = Stack.launch(run_dir, model, "--stay", **tables)
        siege = cls(stack, deadlines, model)
        try:
            asyncio.run(stack.ready("buffer"))
            siege._feed(prompts)
            asyncio.run(siege._trains())
            siege.bystander = Bystander(stack.address("router", "http"))
            siege.bystander.start()
        except BaseException:
            siege.end()
            raise
        return siege

    def _feed(self, prompts: Path) -> None:
        patient = [word for flag in ("--wait-s", "--retry-s", "--stall-s") for word in (flag, "3600")]
        command = [MILEPOST, "feed", str(prompts), "--run", self.stack.run_id, "--source", "prompts"]
        command += ["--buffer", self.stack.address("buffer"), *patient]
        command += ["--acknowledged", str(self.stack.run_dir / "acknowledged.jsonl")]
        with (self.stack.run_dir / "logs" / "feeder.log").open("wb") as log:
            self.feeder = subprocess.Popen(command, stdout=log, stderr=log)

    async def _trains(self) -> None:
        async with self.stack.buffer() as buffer:

            async def training() -> bool:
                return (await self.stack.stats(buffer)).committed_step >= 2

            await until("the first steps", training, within_s=FIRST_STEP_S)

    # ------------------------------------------------------------------ looking

    def pid(self, victim: str) -> int:
        """Process id of a service, or of the Redis that the buffer owns; KeyError while there is none."""
        if victim != "redis":
            pid = self.stack.service(victim)["pid"]
            if pid is None:
                raise KeyError(victim)
            return int(pid)
        for child in psutil.Process(self.pid("buffer")).children():
            if "redis" in child.name():
                return child.pid
        raise KeyError(victim)

    async def pids(self, victims: Collection[str]) -> dict[str, int]:
        """Process ids, once there are such processes: a busy machine may have cost one its life just now."""

        async def found() -> dict[str, int] | None:
            with contextlib.suppress(KeyError, psutil.NoSuchProcess):
                return {victim: self.pid(victim) for victim in victims}
            return None

        return await until(f"{victims} are there", found, within_s=self.deadlines.ready_s)

    async def fleet(self) -> dict[str, EngineState]:
        """State of every engine, from the router; asked once."""
        address = self.stack.address("router")
        async with RouterClient(address, retry=NO_RETRY, timeout_s=self.deadlines.call_s) as router:
            return {e.engine_id: e.state for e in (await router.list_engines()).engines}

    async def state(self, engine: str) -> EngineState | None:
        """State of one engine, as soon as the router answers; None: it knows no such engine."""
        fleet = await until("the fleet", self.fleet, within_s=self.deadlines.ready_s)
        return fleet.get(engine)

    async def counts(self) -> RunStats:
        """Counts of the run, as soon as the buffer answers."""
        async with self.client() as buffer:
            return await until("counts", lambda: self.stack.stats(buffer), within_s=self.deadlines.ready_s)

    async def ask(self, victim: str) -> None:
        """Asks a service whether it is well, until the deadline of a call."""
        await check(self.stack.address(victim), timeout_s=self.deadlines.call_s, wait_for_ready=True)

    async def rolling(self) -> dict[str, int]:
        """Attempt of every prompt that is leased."""
        async with self.client() as buffer:
            rows = [row async for row in buffer.get_ledger(self.stack.run_id)]
        return {row.prompt_id: row.attempt for row in rows if row.state is PromptState.ROLLING}

    async def attempts(self, prompt_ids: Collection[str]) -> dict[str, int]:
        """Attempt of some prompts."""
        async with self.client() as buffer:
            rows = [row async for row in buffer.get_ledger(self.stack.run_id)]
        return {row.prompt_id: row.attempt for row in rows if row.prompt_id in prompt_ids}

    async def has_ended(self, pid: int) -> bool:
        """True too for a process that nobody has waited for yet."""
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    @asynccontextmanager
    async def client(self) -> AsyncIterator[BufferClient]:
        """A client of the buffer that waits for nobody."""
        address = self.stack.address("buffer")
        async with BufferClient(address, retry=NO_RETRY, timeout_s=self.deadlines.call_s) as client:
            yield client

    # ------------------------------------------------------------------ hitting

    def send(self, victim: str, number: signal.Signals) -> int:
        """Sends a signal; returns the process id that got it."""
        pid = self.pid(victim)
        os.kill(pid, number)
        return pid

    async def hit(self, victim: str, number: signal.Signals, *, in_transaction: bool) -> int:
        """Sends a signal now, or while a weight transaction is held open."""
        if not in_transaction:
            return await self._send_once_there(victim, number)
        async with self.held_transaction():
            return await self._send_once_there(victim, number)

    async def _send_once_there(self, victim: str, number: signal.Signals) -> int:
        pid = (await self.pids([victim]))[victim]
        os.kill(pid, number)
        return pid

    @asynccontextmanager
    async def held_transaction(
        self, engine: str = HELD_ENGINE, *, awake_after: bool = True
    ) -> AsyncIterator[None]:
        """Holds a weight transaction open, by one of its engines, for as long as the block takes.

        Args:
          engine: is suspended.
          awake_after: wake it at the end.
        """
        limit_s = self.deadlines.recovery_s("router", signal.SIGSTOP)
        held = await until("an open transaction", lambda: self._hold(engine), within_s=limit_s)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(held, signal.SIGCONT if awake_after else signal.SIGSTOP)

    async def _hold(self, engine: str) -> int | None:
        """Suspends an engine that is being updated; its process id, if the update is still open then."""
        try:
            async with asyncio.timeout(self.deadlines.call_s):
                if (await self.fleet()).get(engine) is not EngineState.UPDATING:
                    return None
                pid = self.send(engine, signal.SIGSTOP)
        except (TimeoutError, KeyError, ProcessLookupError):
            return None
        with contextlib.suppress(MilepostError):
            if (await self.fleet()).get(engine) is EngineState.UPDATING:
                return pid
        os.kill(pid, signal.SIGCONT)
        return None

    @contextmanager
    def unsupervised(self) -> Iterator[None]:
        """Suspends `milepost up`, so that nobody kills or starts anything meanwhile."""
        owner = self.stack.process
        owner.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            owner.send_signal(signal.SIGCONT)

    def double(self, victim: str, *flags: str) -> subprocess.Popen[bytes]:
        """Starts the same service a second time, on a port of its own."""
        words = Path(f"/proc/{self.pid(victim)}/cmdline").read_bytes().decode().split("\0")[:-1]
        at = words.index("--listen")
        own = ["--listen", "127.0.0.1:0", "--metrics_listen", ""]
        command = [*words[:at], *words[at + 2 :], *own, *flags]
        environ = os.environ | {"MILEPOST_DIE_WITH_PARENT": "1"}
        with (self.stack.run_dir / "logs" / f"{victim}-double.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.stack.run_dir, env=environ)
        self.doubles.append(process)
        return process

    async def address_of_double(self, victim: str) -> str:
        """Where a double serves gRPC, once it is ready."""
        log = self.stack.run_dir / "logs" / f"{victim}-double.log"

        async def address() -> str:
            lines = [parse_readiness(line) for line in log.read_text().splitlines()]
            return next((found["grpc"] for found in lines if found and "grpc" in found), "")

        return await until(f"the second {victim} is ready", address, within_s=self.deadlines.ready_s)

    # ------------------------------------------------------------------ recovering

    async def replaced(self, victim: str, pid: int, *, within_s: float) -> None:
        """Waits until another process than `pid` does the victim's work."""

        async def is_another() -> bool:
            with contextlib.suppress(KeyError, psutil.NoSuchProcess):
                service = self.stack.service("buffer" if victim == "redis" else victim)
                return self.pid(victim) != pid and service["state"] == "ready"
            return False

        with self.breaks(f"{victim} was not brought back"):
            await until(f"{victim} is brought back", is_another, within_s=within_s)

    async def goes_on(
        self, what: str, *, within_s: float, steps: int = 2, without: Collection[str] = ()
    ) -> None:
        """Waits until that many more steps are trained and newer weights are served by every engine.

        Args:
          what: has just happened.
          within_s: fail, and give the siege up, after this long.
          steps: how many.
          without: engines that need not serve.
        """
        self.require_whole()
        begun = time.monotonic()
        before: RunStats = await self.counts()

        async def further() -> bool:
            self._require_up()
            async with self.client() as buffer:
                now = await self.stack.stats(buffer)
            if now.committed_step < before.committed_step + steps:
                return False
            if now.weight_version <= before.weight_version:
                return False
            states = {e: state for e, state in (await self.fleet()).items() if e not in without}
            serve = {EngineState.SERVING, EngineState.UPDATING}
            return len(states) == 2 - len(without) and set(states.values()) <= serve

        with self.breaks(what):
            await until(f"the run goes on after {what}", further, within_s=within_s)
        self.took_s[what] = time.monotonic() - begun

    @contextmanager
    def breaks(self, what: str) -> Iterator[None]:
        """What fails in the block breaks the siege."""
        try:
            yield
        except BaseException:
            self.broken = what
            raise

    def require_whole(self) -> None:
        """Fails where an earlier row was not survived."""
        if self.broken:
            pytest.fail(f"the stack did not recover from: {self.broken}")
        self._require_up()

    def _require_up(self) -> None:
        if self.stack.process.poll() is not None:
            self.broken = self.broken or "milepost up ended"
            pytest.fail(f"milepost up ended with {self.stack.process.returncode}\n{self.stack.logs()}")

    # ------------------------------------------------------------------ the end

    async def finish(self) -> None:
        """Ends the source and waits until every accepted prompt is accounted for."""
        assert self.feeder
        assert self.bystander
        self.bystander.end()
        self.feeder.terminate()
        self.feeder.wait(self.deadlines.ready_s)

        async def finished() -> bool:
            async with self.client() as buffer:
                return (await buffer.get_run(self.stack.run_id)).finished

        async with self.stack.buffer() as buffer:
            await buffer.close_source(self.stack.run_id, source_id="prompts")
        limit_s = 2 * self.deadlines.recovery_s("trainer", signal.SIGSTOP)
        await until("the run is finished", finished, within_s=limit_s)

    def end(self) -> None:
        """Ends everything, whatever state it is in."""
        if self.bystander is not None:
            self.bystander.end()
        for process in (self.feeder, *self.doubles):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        self.stack.process.send_signal(signal.SIGCONT)
        if self.stack.process.poll() is None:
            self.stack.stop()

    def defects(self) -> list[str]:
        """Lines of the logs that tell of a defect rather than of a fault."""
        signs = ("please report this", "defect in the gateway", "supervisor failed", "AssertionError")
        signs += ("was destroyed but it is pending", "was never retrieved")
        return [
            f"{path.name}: {line}"
            for path in sorted(self.stack.run_dir.glob("logs/*.log"))
            for line in path.read_text(errors="replace").splitlines()
            if any(sign in line for sign in signs)
        ]

    def checkpoint(self, step: int) -> Path:
        """The newest checkpoint of a step."""
        folders = self.stack.run_dir.joinpath("checkpoints").glob(f"step_{step:08d}.term_*")
        return max(folders, key=lambda p: int(p.name.rpartition("_")[2]))

    def trained(self) -> dict[int, dict[int, list[str]]]:
        """term -> step -> ids of the groups that were committed, from the step log."""
        found: dict[int, dict[int, list[str]]] = {}
        for line in (self.stack.run_dir / "steps.jsonl").read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["term"], {})[row["step"]] = row["prompt_ids"]
        return found
