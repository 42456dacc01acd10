"""Services are replaced one by one while a run goes on, in the order of docs/operations.md.

Each is sent SIGTERM, and a new process with another setting takes its place; the next one follows when the
last column of the table there holds. Nobody supervises: what is not replaced must live through it all.
Judges: the order of the ledger, and the audit before the feeder's ids, the step log and the checkpoints.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launched import Launched, free_port
from milepost import BufferClient, RouterClient
from milepost.client import RolloutClient
from milepost.types import EngineState
from stack import ARITHMETIC, MILEPOST, run, until, write_config

RUN, SOURCE = "upgraded", "sums"
STEPS_BETWEEN = 3
START_S = 180.0  # of one process: it may have to import torch beside all others
STOP_S = 65.0  # of the trainer, which finishes its step and saves; the others take half of it at most
GRPC = ("buffer", "router", "rollout", "trainer")
ENGINES = ("engine-0", "engine-1")
JSON_LOGS = ("--telemetry.log_format", "json")
"""What shows that it was read: every line of the new process's log is an object."""


class Deployment:
    """The services of one run, each a process; `replace` is the upgrade of one."""

    def __init__(self, folder: Path, model: Path) -> None:
        names = (*GRPC, "http", *ENGINES)
        self.at = dict(zip(names, (f"127.0.0.1:{free_port()}" for _ in names), strict=True))
        self.folder, self.running, self.starts = folder, dict[str, Launched](), 0
        folder.mkdir()
        buffer, router = {"buffer": self.at["buffer"]}, {"router": self.at["router"]}
        listen = {name: {"listen": self.at[name], "metrics_listen": ""} for name in GRPC}
        self.config = write_config(
            folder,
            model,
            buffer=listen["buffer"] | {"data_dir": str(folder / "redis")},
            router=listen["router"] | buffer | {"http_listen": self.at["http"], "probe_interval_s": 0.2},
            engine=router | {"metrics_listen": "", "run_id": RUN},
            rollout=listen["rollout"]
            | buffer
            | router
            | {"run_id": RUN, "gateway_id": "gateway", "router_http": f"http://{self.at['http']}"},
            trainer=listen["trainer"] | buffer | router,
        )

    async def start(self, name: str, *flags: str) -> None:
        """A new process, and its readiness."""
        own = ("--engine-id", name, "--port", self.at[name].split(":")[1]) if name in ENGINES else ()
        service = "engine" if name in ENGINES else name
        self.starts += 1
        argv = ("-m", f"milepost_{service}", "serve", "--config", str(self.config), *own, *flags)
        log = self.folder / f"{self.starts:02d}-{name}.log"
        self.running[name] = Launched(log, *argv, start_s=START_S)
        line = await asyncio.to_thread(self.running[name].ready)
        assert "ready" in line, f"{name}: {self.running[name].log.read_text()[-3000:]}"

    async def replace(self, name: str, *flags: str) -> None:
        """SIGTERM; once the old process has ended in order, a new one with other settings."""
        await self.stop(name)
        await self.start(name, *flags, *JSON_LOGS)
        self.assert_others_live()

    async def stop(self, name: str) -> Launched:
        """SIGTERM; it ends in order."""
        old = self.running.pop(name)
        old.process.terminate()
        status = await asyncio.to_thread(old.process.wait, STOP_S)
        old.end()
        assert status == 0, f"{name} ended with {status}: {old.log.read_text()[-3000:]}"
        return old

    def assert_others_live(self) -> None:
        ended = {name: x.process.poll() for name, x in self.running.items() if x.process.poll() is not None}
        assert not ended, f"replacing one ended others: {ended}\n{self.logs()}"

    def logs(self) -> str:
        return "\n".join(
            f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}"
            for p in sorted(self.folder.glob("*.log"))
        )

    def end(self) -> None:
        for launched in self.running.values():
            launched.end()


@pytest.fixture
def deployment(tmp_path: Path, model: Path) -> Iterator[Deployment]:
    deployed = Deployment(tmp_path / RUN, model)
    try:
        yield deployed
    finally:
        deployed.end()


@pytest.fixture
def feeder(deployment: Deployment, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Feeds more prompts than the test can train; waits for the buffer and for the run."""
    run(sys.executable, ARITHMETIC / "make_data.py", "--out", tmp_path, "--train", "40000")
    command = [MILEPOST, "feed", str(tmp_path / "train.jsonl"), "--run", RUN, "--source", SOURCE]
    command += ["--buffer", deployment.at["buffer"], "--batch", "4", "--wait-s", "600", "--stall-s", "600"]
    command += ["--acknowledged", str(deployment.folder / "acknowledged.jsonl")]
    with (deployment.folder / "feed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    yield process
    if process.poll() is None:
        process.kill()
    process.wait(STOP_S)


class Operator:
    """Looks at the run as the table's last column says."""

    def __init__(self, deployment: Deployment, buffer: BufferClient) -> None:
        self._deployment, self._buffer = deployment, buffer

    async def committed(self) -> int:
        stats = await self._buffer.get_stats(RUN)
        return stats[0].committed_step if stats else 0

    async def goes_on(self, after: str, *, within_s: float = 180.0) -> None:
        """More steps are trained than before, and every engine serves."""
        step = await self._asked(f"the ledger answers after {after}", self.committed)

        async def further() -> bool:
            self._deployment.assert_others_live()
            return await self.committed() >= step + STEPS_BETWEEN

        await self._asked(f"steps go on after {after}", further, within_s=within_s)
        await self._asked(f"both engines serve after {after}", self._all_serve)

    async def _all_serve(self) -> bool:
        async with RouterClient(self._deployment.at["router"]) as router:
            engines = (await router.list_engines()).engines
        return [e.state for e in engines] == 2 * [EngineState.SERVING]

    async def _asked(self, what: str, check: Callable[[], Awaitable[Any]], *, within_s: float = 180.0) -> Any:
        try:
            return await until(what, check, within_s=within_s)
        except pytest.fail.Exception:
            print(self._deployment.logs())
            raise

    async def order(self) -> dict[tuple[int, int], str]:
        rows = [row async for row in self._buffer.get_ledger(RUN) if row.step]
        return {(row.step, row.position): row.prompt_id for row in rows}


def running_requests(deployment: Deployment, engine: str) -> int:
    """Rows of an engine's running batch, as it says itself."""
    with urllib.request.urlopen(f"http://{deployment.at[engine]}/server_info", timeout=60) as reply:
        return json.loads(reply.read())["max_running_requests"]


async def gateway_instance(deployment: Deployment) -> str:
    """New at each start of a gateway: leases are its own."""
    async with RolloutClient(deployment.at["rollout"]) as gateway:
        return (await gateway.get_status()).instance_id


async def stop_in_order(deployment: Deployment) -> None:
    """Clients before servers; the last words of each show that it had its new settings."""
    for name in ("rollout", *ENGINES, "router", "buffer"):
        stopped = await deployment.stop(name)
        lines = [json.loads(line) for line in stopped.log.read_text().splitlines()]
        assert any("SIGTERM" in line["event"] for line in lines), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_services_are_replaced_one_by_one_while_the_run_goes_on(
    deployment: Deployment, feeder: subprocess.Popen[bytes]
) -> None:
    for name in ("buffer", "router", *ENGINES, "rollout", "trainer"):
        await deployment.start(name)

    async with BufferClient(deployment.at["buffer"]) as buffer:
        operator = Operator(deployment, buffer)
        await operator.goes_on("the start")

        await deployment.replace("buffer")
        await operator.goes_on("the buffer")

        await deployment.replace("router", "--policy", "least_in_flight")
        await operator.goes_on("the router")

        for engine in ENGINES:
            assert running_requests(deployment, engine) == 64
            await deployment.replace(engine, "--max-running-requests", "16")
            await operator.goes_on(engine)
            assert running_requests(deployment, engine) == 16

        instance = await gateway_instance(deployment)
        await deployment.replace("rollout", "--max_concurrent_samples", "6")
        await operator.goes_on("the gateway")
        assert await gateway_instance(deployment) != instance

        before = await operator.order()
        await deployment.replace("trainer", "--checkpoint.every", "3")
        await operator.goes_on("the trainer")
        after = await operator.order()
        assert {k: v for k, v in after.items() if k in before} == before

        await finish(deployment, buffer, feeder)
        audit = await buffer.audit_ledger(RUN)
        assert audit.problems == ()
        assert (audit.in_flight, audit.lost, audit.twice) == (0, 0, 0)
        assert audit.accepted == audit.trained
        command = ("ledger", "--run", RUN, "--buffer", buffer.address, "--audit")
        report = run(MILEPOST, *command, "--witness", deployment.folder)
        await stop_in_order(deployment)
    for witness in ("acknowledged.jsonl", "checkpoint ", "steps.jsonl"):
        assert witness in report
    assert "lost 0, twice 0" in report
    assert "the audit closes" in report


async def finish(deployment: Deployment, buffer: BufferClient, feeder: subprocess.Popen[bytes]) -> None:
    """Ends the feeder and its source; the trainer trains the rest and ends by itself."""
    feeder.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(feeder.wait, STOP_S) == 130
    assert await buffer.close_source(RUN, source_id=SOURCE) == 0
    trainer = deployment.running.pop("trainer")
    assert await asyncio.to_thread(trainer.process.wait, 180.0) == 0, trainer.log.read_text()[-3000:]
    trainer.end()
    assert (await buffer.get_run(RUN)).finished
