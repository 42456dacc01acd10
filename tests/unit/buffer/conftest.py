"""Fixtures of the ledger's tests: a real Redis for the session, a clock that tests set, one run a test.

The embedded Redis 6.2 always serves; a newer one joins in when `MILEPOST_TEST_REDIS_URL` names it, or when a
`redis-server` 7 or newer is installed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from milepost import types as t
from milepost_buffer.embedded import server_binary
from milepost_buffer.ledger import Ledger, open_ledger
from milepost_buffer.prompts import Lease, StoredPrompt

sys.path.insert(0, str(Path(__file__).parent))  # for ledger_model

START_S = 60.0
_numbers = itertools.count(1)


@contextmanager
def redis_server(binary: str) -> Iterator[str]:
    """A redis-server of the tests' own; yields its URL."""
    with tempfile.TemporaryDirectory(prefix="mp-redis-") as folder:
        path = f"{folder}/redis.sock"
        options = f"--port 0 --unixsocket {path} --dir {folder} --appendonly yes --appendfsync everysec"
        process = subprocess.Popen(
            [binary, *options.split(), "--maxmemory-policy", "noeviction", "--save", ""],
            stdout=subprocess.DEVNULL,
        )
        try:
            _wait_for_socket(path, process)
            yield f"unix://{path}"
        finally:
            process.terminate()
            process.wait(60)


def _wait_for_socket(path: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
                return
            except OSError:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.02)
    raise RuntimeError(f"redis-server did not open {path}")


def newer_binary() -> str | None:
    """A redis-server of version 7 or newer on this machine."""
    for candidate in ("/usr/bin/redis-server", "/usr/local/bin/redis-server", shutil.which("redis-server")):
        if candidate and Path(candidate).exists():
            said = subprocess.run(
                [candidate, "--version"], capture_output=True, text=True, check=False
            ).stdout
            found = re.search(r"v=(\d+)\.", said)
            if found and int(found[1]) >= 7:
                return candidate
    return None


def _kinds() -> list[str]:
    """The Redises that are here."""
    return (
        ["embedded", "newer"] if os.environ.get("MILEPOST_TEST_REDIS_URL") or newer_binary() else ["embedded"]
    )


@pytest.fixture(scope="session", params=_kinds())
def redis_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a real Redis; the tests share it and use runs of their own."""
    url = os.environ.get("MILEPOST_TEST_REDIS_URL")
    if request.param == "newer" and url:
        yield url
        return
    binary = server_binary() if request.param == "embedded" else newer_binary()
    assert binary
    with redis_server(binary) as started:
        yield started


@dataclass
class FakeClock:
    """Time in ms, moved by hand; None lets Redis tell it."""

    now_ms: int | None = 1_000_000

    def __call__(self) -> int | None:
        return self.now_ms

    def advance(self, seconds: float) -> None:
        assert self.now_ms is not None
        self.now_ms += round(seconds * 1000)


def prompt(name: str, *, content: str = "", cursor: str = "") -> StoredPrompt:
    """A stored prompt whose content is its name, unless given."""
    body = (content or name).encode()
    return StoredPrompt(
        prompt_id=name, content=body, digest=hashlib.sha256(body).digest()[:16], cursor=cursor
    )


def group(
    prompt_id: str,
    attempt: int,
    *,
    versions: Sequence[int] = (1,),
    samples: int = 2,
    size: int = 100,
    salt: str = "",
    outcomes: Sequence[t.Outcome] | None = None,
) -> t.Group:
    """A group that fits its header."""
    payload = f"{prompt_id}/{attempt}/{salt}".encode().ljust(size, b".")
    header = t.GroupHeader(
        prompt_id=prompt_id,
        attempt=attempt,
        num_tokens=(10,) * samples,
        outcomes=tuple(outcomes or (t.Outcome.COMPLETED,) * samples),
        weight_versions=tuple(sorted(set(versions))),
        rewards=(1.0, *(0.0,) * (samples - 1)),
        num_loss_tokens=8 * samples if versions else 0,
        digest=hashlib.sha256(payload).digest(),
    )
    return t.Group(header=header, payload=payload)


@dataclass
class Bench:
    """A run with a trainer and a gateway driven by hand."""

    ledger: Ledger
    clock: FakeClock
    run_id: str
    term: int = 0
    prompts_put: int = 0
    versions: dict[int, int] = field(default_factory=dict)

    async def open_term(self, checkpoint: int = 0, **options: object) -> t.ResumePoint:
        """Fences and states a checkpoint."""
        self.term = (await self.ledger.steps.open_term(self.run_id, consumer_id="trainer")).term
        return await self.state(checkpoint, **options)

    async def state(self, checkpoint: int, **options: object) -> t.ResumePoint:
        """States a checkpoint in the term that is open."""
        return await self.ledger.steps.state_checkpoint(
            self.run_id,
            consumer_id="trainer",
            term=self.term,
            checkpoint_step=checkpoint,
            **options,  # type: ignore[arg-type]
        )

    async def publish(self, label: int, *, attempt: int = 1) -> int:
        """Reserves and publishes a version of a step."""
        version = await self.ledger.versions.reserve(self.run_id, term=self.term, step=label, attempt=attempt)
        await self.ledger.versions.publish(self.run_id, term=self.term, version=version, label=label)
        self.versions[label] = version
        return version

    async def put(self, count: int, *, source_id: str = "") -> list[str]:
        """Puts new prompts; all of them must be accepted."""
        names = [f"p{self.prompts_put + i:03d}" for i in range(count)]
        self.prompts_put += count
        result = await self.ledger.prompts.put(
            self.run_id, prompts=[prompt(n) for n in names], source_id=source_id
        )
        assert result.accepted == count, result
        return names

    async def lease(self, count: int, *, gateway: str = "gw", instance: str = "gw-1") -> list[Lease]:
        """Leases prompts."""
        found = await self.ledger.prompts.lease(
            self.run_id, gateway_id=gateway, instance_id=instance, max_prompts=count
        )
        return list(found.leases)

    async def seal(self, leases: Sequence[Lease], **options: object) -> list[t.SealStatus]:
        """Seals a group for each lease."""
        groups = [group(x.prompt_id, x.attempt, **options) for x in leases]  # type: ignore[arg-type]
        return [r.status for r in await self.ledger.prompts.seal(self.run_id, groups=groups)]

    async def lease_step(self, step: int, *, term: int | None = None, max_wait_s: float = 0.0) -> t.StepLease:
        """Leases a step."""
        return await self.ledger.steps.lease(
            self.run_id, consumer_id="trainer", term=term or self.term, step=step, max_wait_s=max_wait_s
        )

    async def step_ids(self, step: int) -> list[str]:
        """Prompt ids of a step that can be leased."""
        lease = await self.lease_step(step)
        assert lease.groups, lease.pending
        return [g.prompt_id for g in lease.groups]

    async def commit(
        self, step: int, ids: Sequence[str], dropped: Sequence[t.DroppedGroup] = ()
    ) -> t.CommitResult:
        """Commits a step."""
        return await self.ledger.steps.commit(
            self.run_id, consumer_id="trainer", term=self.term, step=step, prompt_ids=ids, dropped=dropped
        )

    async def trim(self, step: int) -> t.TrimResult:
        """Trims up to a step."""
        return await self.ledger.steps.trim(self.run_id, consumer_id="trainer", term=self.term, step=step)

    async def stats(self) -> t.RunStats:
        """Counts, after asserting that they add up."""
        s = await self.ledger.accounts.stats(self.run_id)
        live = s.waiting + s.rolling + s.ready + s.assigned
        assert s.accepted == live + s.trained + sum(s.dropped.values())
        return s

    async def audit(self) -> t.AuditReport:
        """Part one of the audit, which must close."""
        report = (await self.ledger.accounts.own_audit(self.run_id)).report
        assert report.closes, report.problems
        return report

    async def row(self, prompt_id: str) -> t.LedgerRow:
        """One row."""
        pages = self.ledger.accounts.rows(self.run_id, prompt_ids=[prompt_id])
        return [r async for page in pages for r in page].pop()

    async def train_step(self, step: int) -> list[str]:
        """Puts, rolls out, leases, commits and publishes one whole step."""
        size = (await self.ledger.runs.get(self.run_id)).config.groups_per_step or 0
        await self.put(size)
        leases = await self.lease(size)
        assert len(leases) == size
        newest = max(self.versions.values())
        assert set(await self.seal(leases, versions=(newest,))) == {t.SealStatus.SEALED}
        ids = await self.step_ids(step)
        await self.commit(step, ids)
        await self.publish(step)
        return ids


SMALL = t.RunConfig(
    groups_per_step=2,
    samples_per_prompt=2,
    max_staleness=1,
    lease_ttl_s=10.0,
    max_group_bytes=1000,
    max_payload_bytes=1_000_000,
)


@asynccontextmanager
async def open_bench(
    redis_url: str, *, config: t.RunConfig = SMALL, started: bool = True
) -> AsyncIterator[Bench]:
    """A new run on a Redis."""
    clock = FakeClock()
    async with open_ledger(redis_url, clock=clock) as ledger:
        run_id = f"t{os.getpid()}-{next(_numbers)}"
        await ledger.runs.create(run_id, config=config)
        bench = Bench(ledger=ledger, clock=clock, run_id=run_id)
        if started:
            await bench.open_term()
            await bench.publish(0)
        yield bench


@pytest.fixture
async def bench(redis_url: str) -> AsyncIterator[Bench]:
    """A run of two groups a step, staleness 1, started and with version 1 published at label 0."""
    async with open_bench(redis_url) as made:
        yield made


@pytest.fixture
def make_bench(redis_url: str):
    """Opens runs of other configurations: `async with make_bench(max_staleness=0) as bench`."""
    from dataclasses import replace

    def make(*, started: bool = True, **changes: object):
        return open_bench(redis_url, config=replace(SMALL, **changes), started=started)  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_group():
    """`group(prompt_id, attempt, ...)`."""
    return group


@pytest.fixture
def make_prompt():
    """`prompt(name, ...)`."""
    return prompt
