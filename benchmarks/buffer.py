"""CPU of the buffer for a sample of 36 KiB, beside redis-py doing the bare minimum on the same Redis.

    ours        make_group, PutGroups ──> LeaseStep with payloads, numpy ──> CommitStep; Trim at the end
    reference   SET ──> GET, numpy ──> DEL, pipelined, on the buffer's own Redis server

Both in batches of 16 samples, one group a sample. CPU of everybody: of ours client, buffer and Redis; of the
reference client and Redis. Prompts are put and leased beforehand: they are the same for any store. What comes
back is compared with what was put.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks.children import Child, child, python
from benchmarks.measure import CpuMeter, Row, Size, family, ratio_row, take_turns
from benchmarks.samples import SAMPLE_BYTES, make_sample, same
from milepost import BufferClient, WeightClient
from milepost import types as t
from milepost.convert import make_group, open_group

TARGET = 2.2
BATCH = 16
BATCHES = 64
INLINE_BYTES = 8 * 1024 * 1024
CALL_S = 30.0


class WrongBytes(Exception):
    """What came back is not what was put."""


@dataclass(frozen=True, kw_only=True)
class Stores:
    """The buffer, its process, and its Redis."""

    process: Child
    client: BufferClient
    weights: WeightClient
    redis: Any


async def measure(size: Size, folder: Path) -> list[Row]:
    """From put to numpy."""
    batches = size.of(BATCHES, least=2)
    samples = [make_sample(i, version=1) for i in range(BATCH)]
    async with _stores(folder) as stores:
        ours, reference = _Ours(stores, samples, batches), _Reference(stores, samples, batches)
        runs = await take_turns(size.runs, ours=ours.run, reference=reference.run)
    more = {"samples_per_run": batches * BATCH, "batch": BATCH, "sample_bytes": SAMPLE_BYTES}
    more |= {"processes_us": ours.shares}
    compared = "redis-py, SET + GET + DEL, pipelined"
    return [
        ratio_row("buffer", runs, unit="us of CPU per sample", target=TARGET, compared=compared, more=more)
    ]


@asynccontextmanager
async def _stores(folder: Path) -> AsyncGenerator[Stores]:
    flags = ("--listen", "127.0.0.1:0", "--metrics_listen", "127.0.0.1:0", "--data_dir", folder / "redis")
    async with child("milepost_buffer", *python("milepost_buffer", "serve", *flags), folder=folder) as buffer:
        await buffer.ready()
        address = buffer.address("grpc")
        plain = redis.Redis(unix_socket_path=str(folder / "redis" / "redis.sock"), socket_timeout=CALL_S)
        plain.config_set("auto-aof-rewrite-percentage", 0)  # a fork in one side's turn would decide the ratio
        try:
            async with BufferClient(address) as client, WeightClient(address) as weights:
                yield Stores(process=buffer, client=client, weights=weights, redis=plain)
        finally:
            plain.close()


class _Ours:
    """Each run is a run of the ledger, so that every one starts alike."""

    def __init__(self, stores: Stores, samples: Sequence[t.Sample], batches: int) -> None:
        self._stores, self._samples, self._batches = stores, samples, batches
        self._names = itertools.count()
        self.shares: dict[str, float] = {}

    async def run(self) -> float:
        """Microseconds of CPU a sample."""
        run_id = f"bench-{next(self._names)}"
        term, leases = await self._prepare(run_id)
        count = self._batches * BATCH
        meter = CpuMeter(os.getpid(), self._stores.process.pid)
        for step in range(1, self._batches + 1):
            await self._batch(run_id, term, step, leases[(step - 1) * BATCH : step * BATCH])
        await self._stores.client.trim_checkpointed(run_id, term=term, step=self._batches)
        spent = meter.by_process()
        names = {os.getpid(): "client", self._stores.process.pid: "buffer"}
        self.shares = {names.get(pid, "redis"): round(s / count * 1e6, 1) for pid, s in spent.items()}
        return sum(spent.values()) / count * 1e6

    async def _prepare(self, run_id: str) -> tuple[int, list[t.PromptLease]]:
        """A run with every prompt put and leased, under published weights."""
        client, weights = self._stores.client, self._stores.weights
        config = t.RunConfig(
            groups_per_step=BATCH, samples_per_prompt=1, max_staleness=self._batches, max_group_bytes=1 << 18,
            lease_ttl_s=600.0, max_payload_bytes=1 << 31,
        )  # fmt: skip
        await client.create_run(run_id, config=config)
        term = (await client.resume_consumer(run_id)).term
        await client.resume_consumer(run_id, term=term, checkpoint_step=0)
        version = await weights.reserve_version(run_id, term=term, step=0, attempt=1)
        await weights.publish_version(run_id, term=term, version=version, label=0, members=["bench"])
        leases: list[t.PromptLease] = []
        for first in range(0, self._batches * BATCH, BATCH):
            items = [t.PromptItem(prompt=t.Prompt(prompt_id=f"p{first + i}", text="?")) for i in range(BATCH)]
            await client.put_prompts(run_id, items=items, max_wait_s=CALL_S)
            found = await client.lease_prompts(
                run_id, gateway_id="bench", instance_id="bench", max_prompts=BATCH, max_wait_s=CALL_S
            )
            leases += found.leases
        return term, leases

    async def _batch(self, run_id: str, term: int, step: int, leases: Sequence[t.PromptLease]) -> None:
        client = self._stores.client
        put = zip(leases, self._samples, strict=True)
        groups = [make_group(lease.prompt, attempt=lease.attempt, samples=[s]) for lease, s in put]
        await client.put_groups(run_id, groups=groups)
        leased = await client.lease_step(
            run_id, term=term, step=step, max_wait_s=CALL_S, inline_bytes=INLINE_BYTES
        )
        ids = [g.prompt_id for g in leased.groups]
        got: list[t.Sample] = []
        for payload in leased.payloads:
            got += open_group(payload).samples
        await client.commit_step(run_id, term=term, step=step, prompt_ids=ids)
        if len(got) != BATCH or (step == 1 and not all(map(same, got, self._samples))):
            raise WrongBytes("the buffer answered with other arrays than it was given")


class _Reference:
    """A hash table that forgets: no ledger, no fencing, nothing to resume."""

    def __init__(self, stores: Stores, samples: Sequence[t.Sample], batches: int) -> None:
        self._stores, self._batches = stores, batches
        self._values = [
            np.frombuffer(s.tokens.tobytes() + s.loss_mask.tobytes() + s.logprobs.tobytes(), np.uint8)
            for s in samples
        ]

    async def run(self) -> float:
        """Microseconds of CPU a sample."""
        servers = [pid for pid in family([self._stores.process.pid]) if pid != self._stores.process.pid]
        meter = CpuMeter(os.getpid(), *servers)
        for batch in range(self._batches):
            self._one(batch)
        spent = {pid: s for pid, s in meter.by_process().items() if pid in (os.getpid(), *servers)}
        return sum(spent.values()) / (self._batches * BATCH) * 1e6

    def _one(self, batch: int) -> None:
        names = [f"plain:{batch}:{i}" for i in range(BATCH)]
        puts = self._stores.redis.pipeline(transaction=False)
        for name, value in zip(names, self._values, strict=True):
            puts.set(name, value.tobytes())
        puts.execute()
        gets = self._stores.redis.pipeline(transaction=False)
        for name in names:
            gets.get(name)
        got = [np.frombuffer(raw, np.uint8) for raw in gets.execute()]
        deletes = self._stores.redis.pipeline(transaction=False)
        for name in names:
            deletes.delete(name)
        deletes.execute()
        if batch == 0 and not all(map(np.array_equal, got, self._values)):
            raise WrongBytes("Redis answered with other bytes than it was given")
