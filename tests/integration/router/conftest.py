"""Real processes for the router's tests: engines, a buffer, routers; and a publisher acting as a trainer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from launched import free_port
from milepost import BufferClient, RouterClient, WeightClient, errors
from milepost import types as t
from milepost_router.service import running
from milepost_router.settings import EngineSettings, RouterSettings
from milepost_trainer.transports.gloo import GlooTransport

START_S = 100.0
CALL_S = 60.0
PROMPT = [3, 4, 5, 6]


# ---- processes ---------------------------------------------------------------------------------------------


class Service:
    """A child process and what its readiness line says."""

    def __init__(self, module: str, *args: str, log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MILEPOST_DIE_WITH_PARENT": "1"}
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *args],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self.log = log
        self._line = ""

    @property
    def line(self) -> str:
        """The readiness line."""
        if not self._line:
            assert self.process.stdout is not None
            deadline = threading.Timer(START_S, self.process.kill)
            deadline.start()
            try:
                self._line = self.process.stdout.readline().strip()
            finally:
                deadline.cancel()
            assert "ready" in self._line, f"not ready: {self._line!r}\n{self.log.read_text()[-3000:]}"
        return self._line

    def address(self, kind: str) -> str:
        """The address of that kind in the readiness line."""
        match = re.search(rf"{kind}=(\S+)", self.line)
        assert match, self.line
        return match[1]

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(timeout=30)

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        if self.process.stdout is not None:
            self.process.stdout.close()
        return self.process.returncode


class EngineProcess(Service):
    """A CPU engine."""

    @property
    def url(self) -> str:
        """Its base URL."""
        return self.line.split()[2]

    @property
    def engine_id(self) -> str:
        """Its name under static configuration."""
        return self.url.removeprefix("http://")


StartEngine = Callable[..., EngineProcess]


def make_model(seed: int) -> Qwen3ForCausalLM:
    """A tiny Qwen3."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Weights of the tiny model, tied ones once."""
    return {name: p.detach().clone() for name, p in make_model(seed).named_parameters()}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model that engines start with."""
    path = tmp_path_factory.mktemp("router") / "tiny"
    make_model(0).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where processes log."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def start_engine(model_dir: Path, logs: Path) -> Iterator[StartEngine]:
    """Starts engines; does not wait for them."""
    started: list[EngineProcess] = []

    def start(*flags: str) -> EngineProcess:
        args = ("serve", "--model", str(model_dir), "--port", "0", "--skip_tokenizer_init", *flags)
        engine = EngineProcess("milepost_engine", *args, log=logs / f"engine-{len(started)}.log")
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.stop()


@pytest.fixture(scope="session")
def engines(start_engine: StartEngine) -> tuple[EngineProcess, EngineProcess]:
    """Two engines that every test may use and none may kill; the releases differ."""
    pair = (start_engine("--dialect", "0.5.21"), start_engine("--dialect", "0.5.19"))
    assert all(e.url for e in pair)
    return pair


@pytest.fixture(scope="session")
def buffer(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a buffer with its own Redis."""
    data = tmp_path_factory.mktemp("redis")
    args = ("serve", "--listen", "127.0.0.1:0", "--data_dir", str(data))
    service = Service("milepost_buffer", *args, log=logs / "buffer.log")
    yield service.address("grpc")
    service.stop()


@pytest.fixture
def start_buffer(logs: Path, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts buffers that a test may suspend and kill; the next one finds what the one before has stored."""
    started: list[Service] = []

    def start(listen: str = "127.0.0.1:0") -> Service:
        args = ("serve", "--listen", listen, "--data_dir", str(tmp_path / "redis"))
        service = Service("milepost_buffer", *args, log=logs / f"buffer-{uuid.uuid4().hex}.log")
        started.append(service)
        return service

    yield start
    for service in started:
        if service.process.poll() is None:
            service.process.send_signal(signal.SIGCONT)
        service.stop()


class RouterProcess(Service):
    """A router."""

    @property
    def grpc(self) -> str:
        """Its gRPC address."""
        return self.address("grpc")

    @property
    def http(self) -> str:
        """Base URL of its HTTP side."""
        return "http://" + self.address("http")


FAST = {
    "probe_interval_s": 0.1,
    "quarantine_s": 0.1,
    "abort_grace_s": 0.5,
    "listen": "127.0.0.1:0",
    "http_listen": "127.0.0.1:0",
}


@dataclass(frozen=True)
class LocalRouter:
    """A router in this process."""

    grpc: str
    http: str


@pytest.fixture
async def start_router(run_id: str) -> AsyncIterator[Callable[..., Awaitable[LocalRouter]]]:
    """Starts routers in this process, over engines of the test's run; an empty buffer means none."""
    async with AsyncExitStack() as stack:

        async def start(*engines: str, buffer: str = "", **settings: Any) -> LocalRouter:
            known = tuple(EngineSettings(url=url, run_id=run_id) for url in engines)
            chosen = FAST | {"buffer": buffer, "engines": known} | settings
            router = await stack.enter_async_context(running(RouterSettings(**chosen)))
            return LocalRouter(grpc=router.grpc_address, http="http://" + router.http_address)

        yield start


@pytest.fixture
def start_router_process(logs: Path, run_id: str, tmp_path: Path) -> Iterator[Callable[..., RouterProcess]]:
    """Starts routers as processes, which can be killed."""
    started: list[RouterProcess] = []

    def start(*engines: str, buffer: str = "", **more: str) -> RouterProcess:
        config = tmp_path / "router.toml"
        tables = "\n".join(f'[[router.engines]]\nurl = "{url}"\nrun_id = "{run_id}"' for url in engines)
        config.write_text(f'[router]\nbuffer = "{buffer}"\n{tables}\n')
        flags = [part for key, value in (FAST | more).items() for part in (f"--{key}", str(value))]
        args = ("serve", "--config", str(config), *flags)
        router = RouterProcess("milepost_router", *args, log=logs / f"router-{uuid.uuid4().hex}.log")
        started.append(router)
        return router

    yield start
    for router in started:
        assert router.stop() in (0, -signal.SIGKILL), router.log.read_text()[-3000:]


# ---- clients -----------------------------------------------------------------------------------------------


async def until(what: str, check: Callable[[], Awaitable[Any]], *, within_s: float = 60.0) -> Any:
    """Asks until the answer is true, and returns it."""
    answer: Any = None
    try:
        async with asyncio.timeout(within_s):
            while not (answer := await check()):  # noqa: ASYNC110 (other processes raise no events here)
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"not within {within_s:g} s: {what} (last answer: {answer!r})")
    return answer


@dataclass(frozen=True)
class Answer:
    """A reply of the HTTP side."""

    status: int
    headers: Any
    body: Any


@asynccontextmanager
async def http_session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client with a deadline."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CALL_S)) as session:
        yield session


async def generate(
    url: str, *, tokens: int = 4, headers: dict[str, str] | None = None, **more: Any
) -> Answer:
    """One /generate."""
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, **more}
    async with (
        http_session() as session,
        session.post(url + "/generate", json=body, headers=headers) as reply,
    ):
        raw = await reply.read()
        return Answer(reply.status, reply.headers, json.loads(raw))


async def released(url: str) -> list[str]:
    """What memory an engine says that it has given up."""
    async with http_session() as session, session.get(url + "/server_info") as reply:
        return (await reply.json())["released_memory"]


async def states(client: RouterClient, run_id: str = "") -> dict[str, t.Engine]:
    """Engines by name."""
    return {e.engine_id: e for e in (await client.list_engines(run_id)).engines}


async def all_are(client: RouterClient, state: t.EngineState, *, version: int | None = None) -> Any:
    """Waits until every engine is in a state, and at a version."""

    async def check() -> bool:
        found = (await states(client)).values()
        return bool(found) and all(
            e.state is state and (version is None or e.weight_version == version) for e in found
        )

    return await until(f"all engines {state.name} at version {version}", check)


class Helpers:
    """Functions of this file for tests, which cannot import it."""

    until = staticmethod(until)
    generate = staticmethod(generate)
    released = staticmethod(released)
    states = staticmethod(states)
    all_are = staticmethod(all_are)
    http_session = staticmethod(http_session)
    weights = staticmethod(lambda seed: weights(seed))
    split = staticmethod(lambda state, count: split(state, count))
    free_port = staticmethod(free_port)
    prompt = PROMPT


@pytest.fixture
def helpers() -> type[Helpers]:
    """The functions."""
    return Helpers


@pytest.fixture
def run_id() -> str:
    """A run of the test's own."""
    return f"run-{uuid.uuid4().hex[:12]}"


# ---- a trainer ---------------------------------------------------------------------------------------------


def spec_of(name: str, tensor: torch.Tensor) -> t.TensorSpec:
    """A manifest entry."""
    return t.TensorSpec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))


def flat_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """A flattened bucket."""
    return b"".join(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for x in tensors.values())


class Publisher:
    """The publishing half of a trainer, bucket by bucket."""

    def __init__(self, router: str, buffer: str, run_id: str, folder: Path) -> None:
        self.router = RouterClient(router)
        self.buffer = BufferClient(buffer)
        self.weights = WeightClient(buffer)
        self.run_id, self.folder = run_id, folder
        self.term = 0
        self.attempt = 0
        self.files: list[Path] = []
        self.gloo: GlooTransport | None = None

    async def begin(self) -> None:
        """Makes the run and takes a term."""
        await self.buffer.create_run(self.run_id)
        self.term = (await self.buffer.resume_consumer(self.run_id)).term

    async def close(self) -> None:
        """Lets go of everything."""
        for file in self.files:
            file.unlink(missing_ok=True)
        for client in (self.router, self.buffer, self.weights):
            await client.close()

    async def prepare(
        self, state: dict[str, torch.Tensor], *, label: int, transport: t.Transport, **more: Any
    ) -> t.Prepared:
        """Opens a transaction."""
        self.attempt += 1
        if transport is t.Transport.GLOO:
            self.gloo = self.gloo or GlooTransport(master_address="127.0.0.1")
            more |= {"master_address": "127.0.0.1", "master_port": self.gloo.master_port}
        request = {
            "run_id": self.run_id,
            "term": self.term,
            "label": label,
            "attempt": self.attempt,
            "manifest": tuple(spec_of(n, x) for n, x in state.items()),
            "transport": transport,
            "timeout_s": 60.0,
        }
        prepared = await self.router.prepare_weights(t.PrepareRequest(**(request | more)))
        if transport is t.Transport.GLOO and prepared.members:
            assert self.gloo is not None
            await self.gloo.open(prepared, timeout_s=30.0)
        return prepared

    def header(
        self, prepared: t.Prepared, index: int, part: dict[str, torch.Tensor], transport: t.Transport
    ) -> t.BucketHeader:
        """The header of one bucket, its bytes staged."""
        handles: tuple[t.HandlesOfEngine, ...] = ()
        if transport is t.Transport.SHM:
            handles = (t.HandlesOfEngine(handles=(self._stage(part).encode(),)),)
        elif transport is t.Transport.DISK:
            folder = self.folder / uuid.uuid4().hex
            folder.mkdir()
            save_file(part, folder / "model.safetensors")
            handles = (t.HandlesOfEngine(handles=(str(folder).encode(),)),)
        return t.BucketHeader(
            transaction_id=prepared.transaction_id,
            fleet_epoch=prepared.fleet_epoch,
            bucket_index=index,
            tensors=tuple(spec_of(n, x) for n, x in part.items()),
            handles=handles,
            size_bytes=sum(x.nbytes for x in part.values()),
        )

    def _stage(self, part: dict[str, torch.Tensor]) -> str:
        path = Path("/dev/shm") / f"milepost-test-{uuid.uuid4().hex}"
        path.write_bytes(flat_bytes(part))
        self.files.append(path)
        entries: list[dict[str, Any]] = []
        offset = 0
        for name, tensor in part.items():
            spec = spec_of(name, tensor)
            entries.append({"name": name, "dtype": spec.dtype, "shape": spec.shape, "offset_bytes": offset})
            offset += tensor.nbytes
        return json.dumps({"kind": "shm", "path": str(path), "size_bytes": offset, "tensors": entries})

    async def transfer(
        self, prepared: t.Prepared, state: dict[str, torch.Tensor], transport: t.Transport
    ) -> list[t.BucketAck]:
        """Sends all buckets (three, or one by disk), waiting for each one's acks."""
        parts = split(state, 1 if transport is t.Transport.DISK else 3)
        acks: asyncio.Queue[t.BucketAck] = asyncio.Queue()

        async def headers() -> AsyncIterator[t.BucketHeader]:
            for index, part in enumerate(parts):
                yield self.header(prepared, index, part, transport)
                if transport is t.Transport.GLOO:
                    with contextlib.suppress(errors.Unavailable):  # the router says who broke the group
                        await self.broadcast(index, part)
                if not all(a.ok for a in (await acks.get()).acks):
                    return

        got: list[t.BucketAck] = []
        async for ack in self.router.update_weights(headers(), timeout_s=CALL_S):
            got.append(ack)
            acks.put_nowait(ack)
        return got

    async def broadcast(self, index: int, part: dict[str, torch.Tensor]) -> None:
        """Sends one bucket's bytes to the group."""
        assert self.gloo is not None
        flat = torch.frombuffer(bytearray(flat_bytes(part)), dtype=torch.uint8)
        bucket: Any = type("Bucket", (), {"size_bytes": flat.numel(), "index": index})
        await self.gloo.send(bucket, flat, timeout_s=30.0)

    async def commit(self, prepared: t.Prepared, num_buckets: int) -> t.Committed:
        """Commits."""
        committed = await self.router.commit_weights(
            prepared.transaction_id,
            fleet_epoch=prepared.fleet_epoch,
            term=self.term,
            num_buckets=num_buckets,
        )
        if self.gloo is not None:
            await self.gloo.close(broken=False)
        return committed

    async def publish(
        self,
        state: dict[str, torch.Tensor],
        *,
        label: int,
        transport: t.Transport = t.Transport.SHM,
        **more: Any,
    ) -> t.Committed:
        """A whole transaction."""
        prepared = await self.prepare(state, label=label, transport=transport, **more)
        assert prepared.members, "nobody takes part"
        acks = await self.transfer(prepared, state, transport)
        return await self.commit(prepared, len(acks))


def split(state: dict[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    """Weights in `count` buckets."""
    names = list(state)
    return [{n: state[n] for n in names[i::count]} for i in range(count)]


@pytest.fixture
async def publisher_of(buffer: str, run_id: str, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Makes publishers for routers."""
    made: list[Publisher] = []

    async def make(router: LocalRouter | RouterProcess, *, at: str = buffer) -> Publisher:
        publisher = Publisher(router.grpc, at, run_id, tmp_path)
        made.append(publisher)
        await publisher.begin()
        return publisher

    yield make
    for publisher in made:
        await publisher.close()
