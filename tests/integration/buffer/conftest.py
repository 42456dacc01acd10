"""A buffer process of the tests' own, started and killed at will, and its clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from redis.asyncio import Redis

from launched import free_port
from milepost import types as t
from milepost.client.buffer import BufferClient
from milepost.client.weights import WeightClient
from milepost.convert import make_group

READY_S = 60.0


@dataclass
class BufferProcess:
    """`python -m milepost_buffer serve` with an embedded Redis in a folder, on a port that stays the same."""

    folder: Path
    flags: tuple[str, ...] = ()
    port: int = field(default_factory=lambda: int(free_port()))
    process: asyncio.subprocess.Process | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def socket(self) -> Path:
        return self.folder / "redis.sock"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}-{self.port}.log")

    async def start(self) -> None:
        """Starts it and waits for the readiness line."""
        await self.launch()
        assert self.process is not None
        assert self.process.stdout is not None
        line = (await asyncio.wait_for(self.process.stdout.readline(), READY_S)).decode()
        if not line.startswith("milepost buffer ready grpc="):
            raise RuntimeError(f"{line!r} {(await self.finish())[1]}")
        assert line.rpartition(":")[2].strip() == str(self.port)

    async def launch(self) -> None:
        """Starts it without waiting."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("MILEPOST_")}
        env["MILEPOST_BUFFER__METRICS_LISTEN"] = ""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as errors:  # no pipe: one that nobody reads is full some day
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "milepost_buffer", "serve"),
                *("--listen", self.address, "--data_dir", str(self.folder), *self.flags),
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env={**env, "MILEPOST_DIE_WITH_PARENT": "1"},
            )

    async def finish(self) -> tuple[int, str]:
        """Waits for its end; returns status and what it said on stderr."""
        assert self.process is not None
        await asyncio.wait_for(self.process.communicate(), READY_S)
        return self.process.returncode or 0, self.log.read_text()

    async def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        await self.finish()

    async def stop(self) -> tuple[int, str]:
        """SIGTERM; returns status and stderr."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        return await self.finish()

    def redis(self) -> list[psutil.Process]:
        """The embedded Redis; nothing while there is none."""
        assert self.process is not None
        found: list[psutil.Process] = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [child] if "redis" in child.name() else []
        return found

    async def redis_pid(self) -> int:
        """Process id of the embedded Redis."""
        client = Redis(unix_socket_path=str(self.socket))
        try:
            return int((await client.info("server"))["process_id"])
        finally:
            await client.aclose()


@pytest.fixture
async def buffer_process(tmp_path: Path) -> AsyncIterator[BufferProcess]:
    """A running buffer."""
    made = BufferProcess(tmp_path / "data")
    await made.start()
    try:
        yield made
    finally:
        if made.process is not None and made.process.returncode is None:
            await made.stop()


@pytest.fixture
def make_process(tmp_path: Path):
    """Makes further buffer processes; the caller stops them."""

    def make(name: str, *flags: str) -> BufferProcess:
        return BufferProcess(tmp_path / name, flags)

    return make


CONFIG = t.RunConfig(groups_per_step=2, samples_per_prompt=2, max_staleness=1, max_group_bytes=8 << 20)


@dataclass
class Driver:
    """Trainer, gateway and prompt client of one run, over gRPC; remembers what it was told."""

    buffer: BufferClient
    weights: WeightClient
    run_id: str = "run"
    term: int = 0
    accepted: list[str] = field(default_factory=list)
    steps: list[t.StepManifest] = field(default_factory=list)
    version: int = 0
    tokens: int = 6
    instance: int = 1

    async def start(self) -> None:
        await self.buffer.create_run(self.run_id, config=CONFIG)
        await self.open_term(0)
        await self.publish(0)
        await self.buffer.open_source(self.run_id, source_id="file", digest="d")

    async def open_term(self, checkpoint: int) -> t.ResumePoint:
        self.term = (await self.buffer.resume_consumer(self.run_id)).term
        return await self.buffer.resume_consumer(
            self.run_id, term=self.term, checkpoint_step=checkpoint, manifest=self.steps
        )

    async def publish(self, label: int) -> None:
        self.version = await self.weights.reserve_version(self.run_id, term=self.term, step=label, attempt=1)
        await self.weights.publish_version(
            self.run_id, term=self.term, version=self.version, label=label, members=["e0"]
        )

    async def put(self, count: int) -> None:
        first = len(self.accepted)
        names = [f"p{first + i}" for i in range(count)]
        items = [t.PromptItem(prompt=t.Prompt(prompt_id=n, text=f"{n}?", label="1"), cursor=n) for n in names]
        cursor = self.accepted[-1] if self.accepted else ""
        result = await self.buffer.put_prompts(
            self.run_id, source_id="file", items=items, expected_cursor=cursor, max_wait_s=10
        )
        self.accepted += names[: result.accepted]

    async def lease(self, count: int, *, max_wait_s: float = 10) -> tuple[t.PromptLease, ...]:
        found = await self.buffer.lease_prompts(
            self.run_id,
            gateway_id="gw",
            instance_id=f"gw-{self.instance}",
            max_prompts=count,
            max_wait_s=max_wait_s,
        )
        return found.leases

    async def lease_all(self, count: int) -> tuple[t.PromptLease, ...]:
        """Leases whose answer a kill took away stay with their instance until a new one takes over."""
        leases = await self.lease(count, max_wait_s=1)
        for _ in range(3):
            if len(leases) == count:
                break
            self.instance += 1
            leases = await self.lease(count, max_wait_s=1)
        return leases

    async def seal(self, leases: tuple[t.PromptLease, ...]) -> list[t.SealStatus]:
        groups = [self.group(lease) for lease in leases]
        return [r.status for r in await self.buffer.put_groups(self.run_id, groups=groups)]

    def group(self, lease: t.PromptLease) -> t.Group:
        """A group whose samples carry its prompt's name."""
        n = self.tokens
        samples = [
            t.Sample(
                index=i,
                tokens=np.arange(n, dtype=np.int32),
                loss_mask=np.ones(n, np.uint8),
                logprobs=np.full(n, -0.5, np.float32),
                version_spans=(t.VersionSpan(start=0, end=n, weight_version=lease.min_version),),
                outcome=t.Outcome.COMPLETED,
                reward=float(i),
                text=lease.prompt.prompt_id,
            )
            for i in range(lease.num_samples)
        ]
        return make_group(lease.prompt, attempt=lease.attempt, samples=samples)

    async def lease_step(self, step: int) -> t.StepLease:
        return await self.buffer.lease_step(self.run_id, term=self.term, step=step, max_wait_s=10)

    async def commit(self, step: int, ids: tuple[str, ...]) -> t.CommitResult:
        result = await self.buffer.commit_step(self.run_id, term=self.term, step=step, prompt_ids=ids)
        if not any(m.step == step for m in self.steps):
            self.steps.append(t.StepManifest(step=step, prompt_ids=ids))
        return result

    async def train_step(self, step: int) -> tuple[str, ...]:
        await self.put(2)
        sealed = await self.seal(await self.lease_all(2))  # again, where a kill took the first answer away
        assert len(sealed) == 2
        assert set(sealed) <= {t.SealStatus.SEALED, t.SealStatus.DUPLICATE}
        ids = tuple(g.prompt_id for g in (await self.lease_step(step)).groups)
        await self.commit(step, ids)
        await self.publish(step)
        return ids

    async def audit(self) -> t.AuditReport:
        """Both parts; must close."""
        witness = t.Witness(
            name="driver",
            steps=tuple(self.steps),
            accepted_prompt_ids=tuple(self.accepted),
            weight_version=self.version,
        )
        report = await self.buffer.audit_ledger(self.run_id, witnesses=[witness])
        assert report.closes, report.problems
        return report


@pytest.fixture
async def driver(buffer_process: BufferProcess) -> AsyncIterator[Driver]:
    """Clients of the running buffer."""
    address = buffer_process.address
    async with BufferClient(address) as buffer, WeightClient(address) as weights:
        yield Driver(buffer, weights)
