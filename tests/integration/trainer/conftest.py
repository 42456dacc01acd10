"""A real buffer, router and engine for the trainer's tests; the test itself plays the gateway."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from milepost import BufferClient
from milepost import types as t
from milepost.convert import make_group
from milepost.errors import DeadlineExceeded, MilepostError, NotFound, ResourceExhausted, Unavailable

READY_S = 180.0
VOCABULARY = 16


class Service:
    """A child process that prints a readiness line."""

    def __init__(self, name: str, *args: str, folder: Path) -> None:
        count = len(list(folder.glob(f"{name}-*.log")))
        self.name, self.log = name, folder / f"{name}-{count}.log"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MILEPOST_DIE_WITH_PARENT": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"milepost_{name}", "serve", *args],
                stdout=log,
                stderr=log,
                cwd=folder,
                env=environment,
            )

    async def ready(self) -> str:
        """Wait for the readiness line; returns it."""

        async def line() -> str:
            assert self.process.poll() is None, self.tail()
            rows = self.log.read_text().splitlines()
            return next((row for row in rows if f"{self.name} ready " in row), "")

        return await until(f"{self.name} is ready", line, within_s=READY_S, hint=self.tail)

    async def grpc(self) -> str:
        """Its gRPC address, once it is ready."""
        return (await self.ready()).partition("grpc=")[2].split()[0]

    async def url(self) -> str:
        """An engine's base URL, once it is ready."""
        return (await self.ready()).split()[2]

    async def exit_code(self, *, within_s: float = 180.0) -> int:
        """Wait for its end."""

        async def ended() -> bool:
            return self.process.poll() is not None

        await until(f"{self.name} has ended", ended, within_s=within_s, hint=self.tail)
        return self.process.returncode

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-3000:]

    def end(self) -> None:
        """SIGTERM, then SIGKILL."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(timeout=10)


async def until(
    what: str,
    check: Callable[[], Awaitable[Any]],
    *,
    within_s: float = 180.0,
    hint: Callable[[], str] = lambda: "",
) -> Any:
    """Ask until the answer is true, and return it."""
    answer: Any = None
    try:
        async with asyncio.timeout(within_s):
            while not (answer := await check()):  # noqa: ASYNC110 (other processes change it: no event)
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"not within {within_s:g} s: {what} (last answer: {answer!r})\n{hint()}")
    return answer


class Gateway:
    """Rolls prompts out by drawing tokens at random; groups are sealed as a gateway seals them."""

    def __init__(self, buffer: BufferClient, run_id: str) -> None:
        self._buffer, self._run_id = buffer, run_id
        self._rng = np.random.default_rng(0)

    async def run(self) -> None:
        """Roll for ever."""
        while True:
            try:
                leases = await self._buffer.lease_prompts(
                    self._run_id, gateway_id="g", instance_id="i", max_prompts=8, max_wait_s=1.0
                )
            except (NotFound, Unavailable, DeadlineExceeded):  # not there yet, or slow for a while
                await asyncio.sleep(0.1)
                continue
            groups = [self._roll(lease) for lease in leases.leases]
            if groups:
                for result in await self._buffer.put_groups(self._run_id, groups=groups):
                    assert result.status in (t.SealStatus.SEALED, t.SealStatus.DUPLICATE), result

    def _roll(self, lease: t.PromptLease) -> t.Group:
        samples = [self._sample(index, lease) for index in range(lease.num_samples)]
        return make_group(lease.prompt, attempt=lease.attempt, samples=samples)

    def _sample(self, index: int, lease: t.PromptLease) -> t.Sample:
        size = int(self._rng.integers(4, 12))
        mask = np.array([0, 0] + [1] * (size - 2), np.uint8)
        return t.Sample(
            index=index,
            tokens=self._rng.integers(0, VOCABULARY, size).astype(np.int32),
            loss_mask=mask,
            logprobs=(np.full(size, -2.7) * mask).astype(np.float32),
            prompt_length=2,
            version_spans=(t.VersionSpan(start=2, end=size, weight_version=lease.min_version),),
            version_spans_exact=True,
            reward=float(self._rng.integers(0, 2)),
            outcome=t.Outcome.COMPLETED,
            text="x",
        )


class Stack:
    """Everything but the trainer, and trainers on demand."""

    def __init__(self, folder: Path, model: Path, run_id: str) -> None:
        self.folder, self.model, self.run_id = folder, model, run_id
        self.services: list[Service] = []
        self.buffer = self.router = "127.0.0.1:1"
        self.metrics = folder / "metrics"
        self.checkpoints = folder / "checkpoints"

    async def start(self) -> None:
        """Buffer, then router."""
        data = ("--data_dir", str(self.folder / "redis"), "--listen", "127.0.0.1:0")
        self.buffer = await self._service("buffer", *data).grpc()
        flags = ("--listen", "127.0.0.1:0", "--http_listen", "127.0.0.1:0", "--probe_interval_s", "0.2")
        self.router = await self._service("router", "--buffer", self.buffer, *flags).grpc()

    def start_engine(self, name: str) -> Service:
        """One more engine, with random weights of its own."""
        router = ("--router", self.router, "--engine_id", name, "--run_id", self.run_id)
        model = ("--model", str(self.model), "--load_format", "dummy", "--skip_tokenizer_init", "--port", "0")
        return self._service("engine", *model, *router)

    def start_trainer(self, *flags: str) -> Service:
        """A trainer of the run."""
        return self._service(
            "trainer",
            *("--config", str(self._config())),
            *("--buffer", self.buffer, "--router", self.router, *flags),
        )

    def _config(self) -> Path:
        path = self.folder / "milepost.toml"
        path.write_text(
            f"""
[run]
run_id = "{self.run_id}"
groups_per_step = 4
samples_per_prompt = 2
max_staleness = 1

[trainer]
model_dir = "{self.model}"
listen = "127.0.0.1:0"
updates_per_step = 2
max_tokens_per_micro_batch = 24
lease_wait_s = 1.0

[trainer.optimizer]
lr = 1e-3

[trainer.checkpoint]
dir = "{self.checkpoints}"
every = 3

[trainer.publish]
disk_dir = "{self.folder / "weights"}"
timeout_s = 30
bucket_bytes = 20000
retry_delay_s = 0.2

[trainer.metrics]
dir = "{self.metrics}"
transcripts_every = 2
tensorboard = false
"""
        )
        return path

    def _service(self, name: str, *args: str) -> Service:
        service = Service(name, *args, folder=self.folder)
        self.services.append(service)
        return service

    def rows(self, file: str) -> list[dict[str, Any]]:
        """Whole lines of a JSONL file that the trainer writes."""
        path = self.metrics / file
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    async def feed(self, client: BufferClient, *, first: int, count: int, close: bool = False) -> None:
        """Put prompts, as credits allow."""
        items = [
            t.PromptItem(prompt=t.Prompt(prompt_id=f"p/{i}", text=str(i), label="x"))
            for i in range(first, first + count)
        ]
        await client.open_source(self.run_id, source_id="test")
        async with asyncio.timeout(180):
            while items:
                try:
                    result = await client.put_prompts(
                        self.run_id, source_id="test", items=items, max_wait_s=5.0
                    )
                    items = items[result.accepted :]
                except ResourceExhausted:
                    continue
        if close:
            await client.close_source(self.run_id, source_id="test")

    async def committed(self, client: BufferClient) -> int:
        """Newest committed step."""
        return (await client.get_run(self.run_id)).committed_step

    async def weights_of(self, url: str, name: str) -> Any:
        """One tensor as an engine holds it."""
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/get_weights_by_name", json={"name": name, "truncate_size": 10**6}) as reply,
        ):
            body = await reply.json()
            assert reply.status == 200, body
            return body

    def end(self) -> None:
        """Stop all, the newest first."""
        for service in reversed(self.services):
            service.end()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def stack(tmp_path: Path, tiny_model: Path) -> Iterator[Stack]:
    """A stack that is stopped whatever happens; `await stack.start()` first."""
    made = Stack(tmp_path, tiny_model, run_id="run")
    yield made
    made.end()


@pytest.fixture
def wait_until() -> Callable[..., Awaitable[Any]]:
    """`until` for tests."""
    return until


@pytest.fixture
async def rolling() -> AsyncIterator[Callable[[BufferClient, str], None]]:
    """Starts gateways that roll until the test ends; an error of theirs fails it."""
    tasks: list[asyncio.Task[None]] = []

    def start(client: BufferClient, run_id: str) -> None:
        tasks.append(asyncio.create_task(Gateway(client, run_id).run()))

    yield start
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(result, asyncio.CancelledError | MilepostError) and result is not None:
            raise result
