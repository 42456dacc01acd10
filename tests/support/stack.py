"""A whole stack under `milepost up`: start it, look at it, kill parts of it, stop it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from milepost import BufferClient
from milepost.errors import MilepostError
from milepost.types import AuditReport, LedgerRow, RunStats

ROOT = Path(__file__).resolve().parents[2]
ARITHMETIC = ROOT / "examples" / "arithmetic"
MILEPOST = str(Path(sys.executable).with_name("milepost"))
READY_S = 180.0  # of one service: several import torch at once, on a machine that does other work as well
STOP_S = 120.0
FED = 130  # exit status of a feeder after Ctrl-C


def run(*command: str | Path, timeout_s: float = 120.0) -> str:
    """Runs a command to its end; returns what it printed."""
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=timeout_s, cwd=ROOT
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


async def until(what: str, check: Callable[[], Awaitable[Any]], *, within_s: float) -> Any:
    """Asks until the answer is true, and returns it; fails with `what` at the deadline."""
    answer: Any = None
    try:
        async with asyncio.timeout(within_s):
            while True:
                with contextlib.suppress(MilepostError):
                    answer = await check()
                    if answer:
                        return answer
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"not within {within_s:.0f} s: {what} (last answer: {answer!r})")


@dataclass
class Stack:
    """A running `milepost up`."""

    run_id: str
    run_dir: Path
    process: subprocess.Popen[bytes]
    feeders: list[Feeder] = field(default_factory=list["Feeder"])

    @classmethod
    def launch(cls, run_dir: Path, model: Path, *flags: str, **changes: Any) -> Stack:
        """Starts one in a folder, which gives the run its name; `changes` are for `write_config`."""
        run_dir.mkdir()
        write_config(run_dir, model, **changes)
        return cls._start(run_dir, *flags)

    @classmethod
    def _start(cls, run_dir: Path, *flags: str) -> Stack:
        config = run_dir / "milepost.toml"
        command = [MILEPOST, "up", "--config", str(config), "--ports", "free", *flags]
        with (run_dir / "up.log").open("ab") as log:
            environ = os.environ | {"MILEPOST_DIE_WITH_PARENT": "1"}
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=run_dir, env=environ)
        return cls(run_id=run_dir.name, run_dir=run_dir, process=process)

    def again(self, *flags: str) -> Stack:
        """One more `milepost up` in the folder of this one, which has stopped."""
        (self.run_dir / "up.json").unlink(missing_ok=True)
        return self._start(self.run_dir, *flags)

    def service(self, name: str) -> dict[str, Any]:
        """What up.json says of a service."""
        return json.loads((self.run_dir / "up.json").read_text())["services"][name]

    def address(self, name: str, protocol: str = "grpc") -> str:
        """Where a service listens; the same after a restart."""
        return self.service(name)["addresses"][protocol]

    async def ready(self, name: str, *, starts: int = 1) -> dict[str, Any]:
        """Waits until a service is ready for the `starts`-th time or more."""

        async def check() -> dict[str, Any] | None:
            if self.process.poll() is not None:
                pytest.fail(f"milepost up ended with {self.process.returncode}\n{self.logs()}")
            with contextlib.suppress(FileNotFoundError, KeyError):
                service = self.service(name)
                if service["state"] == "ready" and service["starts"] >= starts:
                    return service
            return None

        return await until(f"{name} ready, start {starts}", check, within_s=READY_S)

    async def feed(self, prompts: Path) -> Feeder:
        """Starts a feeder, once the buffer is ready; it dies with the stack."""
        await self.ready("buffer")
        self.feeders.append(Feeder(self, prompts))
        return self.feeders[-1]

    async def kill(self, name: str) -> None:
        """kill -9, then waits until the supervisor has brought it back."""
        service = await self.ready(name)
        os.kill(service["pid"], signal.SIGKILL)
        await self.ready(name, starts=service["starts"] + 1)

    @asynccontextmanager
    async def buffer(self) -> AsyncIterator[BufferClient]:
        """A client of the buffer."""
        await self.ready("buffer")
        async with BufferClient(self.address("buffer")) as client:
            yield client

    async def stats(self, buffer: BufferClient) -> RunStats:
        """Counts of the run."""
        return (await buffer.get_stats(self.run_id))[0]

    async def goes_on(self, buffer: BufferClient, *, steps: int, after: int | None = None) -> int:
        """Waits until that many more steps are committed than `after`, or than now; returns the newest."""
        start = (await self.stats(buffer)).committed_step if after is None else after

        async def committed() -> int:
            step = (await self.stats(buffer)).committed_step
            return step if step >= start + steps else 0

        return await until(f"{steps} steps after {start} are committed", committed, within_s=READY_S)

    async def finish(self, buffer: BufferClient, feeder: Feeder) -> None:
        """Ends the feeder, and waits until every prompt that was taken is accounted for."""
        await feeder.end(buffer)
        await self.finished(buffer, within_s=READY_S)

    async def finished(self, buffer: BufferClient, *, within_s: float) -> None:
        """Waits until every prompt that was taken is accounted for, and none will follow."""

        async def finished() -> bool:
            return (await buffer.get_run(self.run_id)).finished

        await until("the run is finished", finished, within_s=within_s)

    async def audited(self, buffer: BufferClient) -> tuple[AuditReport, str]:
        """The ledger's account, and what `milepost ledger --audit` says of it before all of its witnesses."""
        told = run(
            MILEPOST, "ledger", "--run", self.run_id, "--buffer", buffer.address, "--audit",
            "--witness", self.run_dir,
        )  # fmt: skip
        return await buffer.audit_ledger(self.run_id), told

    async def order(self, buffer: BufferClient) -> dict[tuple[int, int], str]:
        """(step, position) -> prompt_id of every group in a step."""
        rows: list[LedgerRow] = [r async for r in buffer.get_ledger(self.run_id) if r.step]
        return {(r.step, r.position): r.prompt_id for r in rows}

    def logs(self) -> str:
        """The end of each log, for failures."""
        parts = [
            f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}"
            for p in sorted(self.run_dir.glob("logs/*.log"))
        ]
        return "\n".join(parts)

    def stop(self) -> int:
        """Ctrl-C; returns the exit status."""
        for feeder in self.feeders:
            feeder.kill()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"milepost up did not stop within {STOP_S} s\n{self.logs()}")


class Feeder:
    """`milepost feed` of more prompts than a run can train.

    Such a run lasts as long as its test looks at it, however slow the test or fast the run is.
    """

    def __init__(self, stack: Stack, prompts: Path) -> None:
        self._run_id = stack.run_id
        patient = [word for flag in ("--wait-s", "--retry-s", "--stall-s") for word in (flag, "3600")]
        command = [MILEPOST, "feed", str(prompts), "--run", stack.run_id, "--source", "prompts", *patient]
        command += ["--buffer", stack.address("buffer"), "--batch", "4"]
        command += ["--acknowledged", str(stack.run_dir / "acknowledged.jsonl")]
        environ = os.environ | {"MILEPOST_DIE_WITH_PARENT": "1"}
        with (stack.run_dir / "logs" / "feeder.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)

    async def stop(self) -> None:
        """Ctrl-C; another feeder may go on with the source."""
        self.process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(self.process.wait, STOP_S) == FED

    async def end(self, buffer: BufferClient) -> None:
        """Ctrl-C, and no prompt will follow those that were taken."""
        await self.stop()
        await buffer.close_source(self._run_id, source_id="prompts")

    def kill(self) -> None:
        """Ends it whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_S)


def write_config(run_dir: Path, model: Path, **changes: Any) -> Path:
    """A small run: 4 groups of 2 samples a step, checkpoint every 4 steps."""
    tables: dict[str, Any] = {
        "run": {
            "run_id": run_dir.name,
            "groups_per_step": 4,
            "samples_per_prompt": 2,
            "max_staleness": 2,
            "lease_ttl_s": 5.0,
            "reward": "exact",
        },
        "run.sampling": {"temperature": 1.0, "max_new_tokens": 5},
        "up": {"run_dir": str(run_dir), "engines": 2},
        "engine": {"model": str(model)},
        "rollout": {"tokenizer": str(model)},
        "trainer": {"model_dir": str(model), "export_dir": str(run_dir / "final")},
        "trainer.checkpoint": {"dir": str(run_dir / "checkpoints"), "every": 4},
        "trainer.metrics": {"dir": str(run_dir), "tensorboard": False},
    }
    for name, table in changes.items():
        tables[name.replace("__", ".")] = tables.get(name.replace("__", "."), {}) | table
    lines: list[str] = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items()), ""]
    path = run_dir / "milepost.toml"
    path.write_text("\n".join(lines))
    return path
