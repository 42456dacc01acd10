"""Real processes for the gateway's tests: one engine and one ledger for all, others as wanted."""

# ruff: noqa: ASYNC110  # polled with a deadline: other processes have no events here

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from milepost.client.buffer import BufferClient
from milepost.client.weights import WeightClient
from milepost.types import LedgerRow, Prompt, PromptItem, PromptState, RunConfig, SamplingParams, StepGroup

ROOT = Path(__file__).parents[3]
START_S = 90.0
DEADLINE_S = 90.0


class Process:
    """A child process with a readiness line; its stderr goes to a file."""

    def __init__(self, module: str, *args: str, log: Path, cwd: Path | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MILEPOST_DIE_WITH_PARENT": "1"}
        self.log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *args],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=cwd,
            )

    def ready(self, pattern: str) -> str:
        """Waits for the readiness line and returns what the pattern's group matches in it."""
        assert self._process.stdout is not None
        deadline = threading.Timer(START_S, self._process.kill)
        deadline.start()
        try:
            for line in self._process.stdout:
                if match := re.search(pattern, line):
                    return match[1]
        finally:
            deadline.cancel()
        raise AssertionError(f"ended with {self._process.wait(30)}:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait(30)
        self._close()

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM; returns the exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Waits for the end; returns the exit status."""
        try:
            return self._process.wait(timeout_s)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait(30)
            self._close()

    def _close(self) -> None:
        if self._process.stdout is not None:
            self._process.stdout.close()


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rollout_logs")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its character tokenizer."""
    out = tmp_path_factory.mktemp("model")
    script = ROOT / "examples" / "arithmetic" / "make_model.py"
    subprocess.run(
        [sys.executable, str(script), "--out", str(out)], check=True, timeout=START_S, capture_output=True
    )
    return out


@dataclass
class EngineHandle:
    """The engine all tests share; it carries the version string a test gives it."""

    url: str

    def call(self, path: str, **body: Any) -> None:
        """Posts JSON."""
        request = urllib.request.Request(
            f"{self.url}{path}", data=json.dumps(body).encode(), headers={"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            assert reply.status == 200

    def carry(self, version: str) -> None:
        """Sets its version string."""
        self.call("/update_weight_version", new_version=version, abort_all_requests=False)


@pytest.fixture(scope="session")
def engine(model: Path, logs: Path) -> Iterator[EngineHandle]:
    process = Process(
        "milepost_engine",
        "--model",
        str(model),
        "--port",
        "0",
        "--context-length",
        "64",
        log=logs / "engine.log",
    )
    try:
        yield EngineHandle(url=process.ready(r"(http://[\d.]+:\d+)"))
    finally:
        process.stop()


@pytest.fixture(scope="session")
def ledger_address(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> Iterator[str]:
    data = tmp_path_factory.mktemp("ledger")
    args = ("serve", "--listen", "127.0.0.1:0", "--data_dir", str(data), "--appendfsync", "everysec")
    process = Process("milepost_buffer", *args, log=logs / "buffer.log")
    try:
        yield process.ready(r"grpc=(\S+)")
    finally:
        process.stop()


StartGateway = Callable[..., tuple[Process, str]]


@pytest.fixture
def start_gateway(model: Path, tmp_path: Path) -> Iterator[StartGateway]:
    """Starts gateways on free ports; returns the process and its address ("" with `ready=False`)."""
    started: list[Process] = []

    def start(*flags: str, ready: bool = True, **settings: Any) -> tuple[Process, str]:
        options = {"listen": "127.0.0.1:0", "router": "", "tokenizer": str(model), "drain_s": 5, **settings}
        args = [x for key, value in options.items() for x in (f"--{key}", str(value))]
        log = tmp_path / f"gateway-{len(started)}.log"
        process = Process("milepost_rollout", "serve", *args, *flags, log=log, cwd=tmp_path)
        started.append(process)
        return process, process.ready(r"milepost rollout ready grpc=(\S+)") if ready else ""

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def start_router(logs: Path) -> Iterator[Callable[..., tuple[Process, str, str]]]:
    """Starts routers; returns the process and its gRPC and HTTP addresses."""
    started: list[Process] = []

    def start(**settings: Any) -> tuple[Process, str, str]:
        options = {"listen": "127.0.0.1:0", "http_listen": "127.0.0.1:0", "probe_interval_s": 0.1, **settings}
        args = [x for key, value in options.items() for x in (f"--{key}", str(value))]
        process = Process("milepost_router", "serve", *args, log=logs / f"router-{len(started)}.log")
        started.append(process)
        grpc, _, http = process.ready(r"grpc=(\S+ http=\S+)").partition(" http=")
        return process, grpc, http

    yield start
    for process in started:
        process.kill()


@dataclass
class Driver:
    """Plays the trainer and the prompts' source for one run."""

    buffer: BufferClient
    weights: WeightClient
    run_id: str = field(default_factory=lambda: f"run-{uuid.uuid4().hex[:8]}")
    term: int = 0

    async def create(self, **config: Any) -> None:
        """Makes the run and takes its publisher's place."""
        defaults: dict[str, Any] = {
            "groups_per_step": 4,
            "samples_per_prompt": 2,
            "max_staleness": 4,
            "reward": "exact",
            "sampling": SamplingParams(max_new_tokens=5),
        }
        await self.buffer.create_run(self.run_id, config=RunConfig(**{**defaults, **config}))
        self.term = (await self.buffer.resume_consumer(self.run_id)).term
        await self.buffer.resume_consumer(self.run_id, term=self.term, checkpoint_step=0)

    async def publish(self, label: int, engine: EngineHandle) -> int:
        """Publishes a version; the engine carries its string."""
        version = await self.weights.reserve_version(self.run_id, term=self.term, step=label, attempt=1)
        await asyncio.to_thread(engine.carry, f"{self.run_id}/{version}/{label}")
        await self.weights.publish_version(
            self.run_id, term=self.term, version=version, label=label, members=["e"]
        )
        return version

    async def feed(self, *prompts: Prompt) -> None:
        """Puts prompts; there are credits for all of them."""
        items = [PromptItem(prompt=p) for p in prompts]
        result = await self.buffer.put_prompts(self.run_id, items=items, max_wait_s=10)
        assert result.accepted == len(prompts), result

    async def step(self, step: int) -> tuple[StepGroup, ...]:
        """Leases a step, waiting for it."""
        async with asyncio.timeout(DEADLINE_S):
            while not (
                lease := await self.buffer.lease_step(self.run_id, term=self.term, step=step, max_wait_s=5)
            ).groups:
                pass
        return lease.groups

    async def payloads(self, prompt_ids: Sequence[str]) -> list[bytes]:
        """Fetches payloads in order."""
        fetched = self.buffer.fetch_groups(self.run_id, prompt_ids=prompt_ids)
        return [payload async for _, payload in fetched]

    async def rows(self) -> dict[str, LedgerRow]:
        """The ledger by prompt."""
        return {row.prompt_id: row async for row in self.buffer.get_ledger(self.run_id)}

    async def until(self, condition: Callable[[dict[str, LedgerRow]], Any]) -> dict[str, LedgerRow]:
        """Waits for a state of the ledger."""
        rows: dict[str, LedgerRow] = {}
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not condition(rows := await self.rows()):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"the ledger never got there: {rows}") from None
        return rows

    async def until_states(self, **wanted: PromptState) -> dict[str, LedgerRow]:
        """Waits until each prompt is in the state wanted."""
        return await self.until(lambda rows: all(rows[p].state is s for p, s in wanted.items()))


@pytest.fixture
async def driver(ledger_address: str) -> AsyncIterator[Driver]:
    async with BufferClient(ledger_address) as buffer, WeightClient(ledger_address) as weights:
        yield Driver(buffer=buffer, weights=weights)
