"""Engines for the conformance suite.

By default the suite starts the CPU engine, once per dialect that a test asks for, on a tiny random Qwen3. Set
`MILEPOST_ENGINE_URL` to run it against any engine with SGLang's HTTP surface, and `MILEPOST_ENGINE_MODEL` to
the folder of the model it serves (`MILEPOST_ENGINE_KEY`, if its admin routes want one). A skip then names the
limit of SGLang that it respects. `tests/gpu` does so with SGLang on a GPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moments import Missed, caught
from tiny_tokenizer import CHARACTERS, make_tokenizer

CONTEXT = 32768
START_DEADLINE_S = 100.0
CALL_DEADLINE_S = 60.0
WARM_UP_S = 150.0


def make_model(seed: int) -> Qwen3ForCausalLM:
    """A tiny Qwen3 with tied embeddings and weights wide enough for its distributions to differ."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model that engines of this session serve."""
    given = os.environ.get("MILEPOST_ENGINE_MODEL")
    if given:
        return Path(given)
    path = tmp_path_factory.mktemp("conformance") / "tiny-qwen3"
    make_model(0).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


class Reference:
    """The same model in the test's process: the judge of log-probs, in float32 from the stored weights."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        config = json.loads((path / "config.json").read_text())
        self.stored = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")

    @torch.no_grad()
    def logprobs(self, prompt: list[int], output: list[int], *, temperature: float = 1.0) -> list[float]:
        """Log-probs of the output tokens after the prompt, by one plain forward pass."""
        tokens = torch.tensor([prompt + output])
        logits = self.model(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].double() / temperature
        return logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0].tolist()

    def state(self) -> dict[str, torch.Tensor]:
        """Its weights by name, tied ones once."""
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def perturbed(self, seed: int) -> dict[str, torch.Tensor]:
        """Other weights of the same shapes, which the stored dtype can hold."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: (value + 0.05 * torch.randn(value.shape, generator=generator)).to(self.stored).float()
            for name, value in self.state().items()
        }

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Takes new weights."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[name])


@pytest.fixture(scope="session")
def ids(model_dir: Path) -> Callable[[str], list[int]]:
    """Tokens of a text."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return lambda text: list(tokenizer.encode(text))


@pytest.fixture
def reference(model_dir: Path) -> Reference:
    """A fresh reference model with the weights that engines start from."""
    return Reference(model_dir)


class EngineUnderTest:
    """One engine, by its URL."""

    def __init__(self, url: str, *, key: str = "") -> None:
        self.url = url
        self.key = key
        with self.sync_client() as client:
            self.info: dict[str, Any] = client.get("/server_info").json()
        self.version = str(self.info["version"])
        self.ours = self.info.get("engine") == "milepost_engine"
        self.context_length = int(self.info.get("context_length") or 0)
        self.tolerance = 1e-5 if self.ours else 1e-1  # SGLang computes in bfloat16
        self.draws_by_seed = self.ours or bool(self.info.get("enable_deterministic_inference"))

    @property
    def has_sessions(self) -> bool:
        """Updates belong between /begin_weight_update and /end_weight_update."""
        return _release(self.version) >= (0, 5, 21)

    @property
    def long(self) -> dict[str, Any]:
        """Sampling of a request that does not end by itself while a test looks elsewhere."""
        return {"max_new_tokens": 30_000 if self.ours else 1500, "temperature": 0.0, "ignore_eos": True}

    @property
    def has_spans(self) -> bool:
        """Finished replies carry spans of weight versions."""
        return _release(self.version) >= (0, 5, 19)

    def _options(self) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        return {"base_url": self.url, "timeout": CALL_DEADLINE_S, "headers": headers}

    def warm_up(self) -> None:
        """Has its sampling compiled: SGLang does so, for a minute, when it is first asked for."""
        with self.sync_client() as client:
            for more in ({}, {"top_p": 0.9, "top_k": 5}):
                sampling = {"max_new_tokens": 2, "ignore_eos": True, **more}
                body = {"input_ids": [2, 3], "sampling_params": sampling, "return_logprob": True}
                reply = client.post("/generate", json=body, timeout=WARM_UP_S)
                assert reply.status_code == 200, reply.text

    def sync_client(self) -> httpx.Client:
        """A client for fixtures."""
        return httpx.Client(**self._options())

    @asynccontextmanager
    async def client(self) -> AsyncIterator[EngineClient]:
        """A client for one test."""
        async with httpx.AsyncClient(**self._options()) as http:
            yield EngineClient(http, self)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


class EngineClient:
    """What tests call; every method fails on an unexpected status."""

    def __init__(self, http: httpx.AsyncClient, engine: EngineUnderTest) -> None:
        self.http = http
        self.engine = engine

    async def post(self, path: str, body: Any = None, *, status: int = 200) -> Any:
        """Posts JSON and returns the decoded reply, or its text."""
        reply = await self.http.post(path, json={} if body is None else body)
        assert reply.status_code == status, f"{path}: {reply.status_code} {reply.text[:500]}"
        return _decoded(reply)

    async def get(self, path: str) -> Any:
        """Gets a decoded reply."""
        reply = await self.http.get(path)
        assert reply.status_code == 200, f"{path}: {reply.status_code} {reply.text[:500]}"
        return _decoded(reply)

    async def generate(self, prompt: list[int], **sampling: Any) -> dict[str, Any]:
        """One sample with log-probs."""
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        return await self.post("/generate", body)

    def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[Any]:
        """The events of a streamed reply, decoded; the stream must end with [DONE]."""
        return self._events(path, body)

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncIterator[Any]:
        last = ""
        async with self.http.stream("POST", path, json={**body, "stream": True}) as reply:
            assert reply.status_code == 200, (await reply.aread())[:500]
            async for line in reply.aiter_lines():
                if not line:
                    continue
                assert line.startswith("data: "), line
                last = line.removeprefix("data: ")
                if last != "[DONE]":
                    yield json.loads(last)
        assert last == "[DONE]"

    async def checksum(self) -> str:
        """Hash of all weights."""
        reply = await self.post("/weights_checker", {"action": "checksum"})
        return reply["ranks"][0]["per_gpu_checksum"]

    async def num_live(self) -> int:
        """Requests running or waiting; SGLang tells it at each prefill, now and then, and at rest."""
        if self.engine.ours:
            states = (await self.get("/server_info"))["internal_states"]
        else:
            states = (await self.get("/v1/loads?include=core"))["loads"]
        return sum(state["num_running_reqs"] + state["num_waiting_reqs"] for state in states)

    async def tokens_generated(self) -> int:
        """Tokens of all requests since its start; our engine alone tells them at any time."""
        (state,) = (await self.get("/server_info"))["internal_states"]
        return int(state["tokens_generated"])

    async def at_rest(self) -> None:
        """Waits until nothing runs any more, and forgets cached prefixes."""

        async def flushed() -> bool:
            return (await self.http.post("/flush_cache")).status_code == 200

        await self.until(flushed)

    async def until(self, condition: Callable[[], Any], *, deadline_s: float = CALL_DEADLINE_S) -> None:
        """Polls an async condition until it holds."""
        async with asyncio.timeout(deadline_s):
            while not await condition():  # noqa: ASYNC110 (the condition lives in another process)
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def updating(self) -> AsyncIterator[None]:
        """A weight update session, where the release has them."""
        if not self.engine.has_sessions:
            yield
            return
        await self.post("/begin_weight_update")
        try:
            yield
        finally:
            await self.post("/end_weight_update")

    async def start_stream(self, prompt: list[int], *, after: int = 1, **sampling: Any) -> Stream:
        """A streamed generation of which at least `after` tokens have come."""
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        stream = Stream(self.events("/generate", body))
        await stream.tokens(after)
        return stream

    async def held_stream(self, prompt: list[int], *, mode: str, after: int, **sampling: Any) -> Stream:
        """A streamed generation that a pause holds in its middle."""

        async def hold() -> Stream:
            stream = await self.start_stream(prompt, after=after, **sampling)
            await self.hold(stream, mode=mode)
            return stream

        return await caught("a generation in its middle", hold)

    async def hold(self, stream: Stream, *, mode: str) -> None:
        """Pauses the engine while the stream, its one request, goes on.

        Raises:
          Missed: it had ended already; the engine is not paused.
        """
        await self.post("/pause_generation", {"mode": mode})
        if self.engine.ours and not await self.num_live():
            await self.post("/continue_generation")
            await stream.finished()
            raise Missed


class Stream:
    """A streamed generation, read in the background."""

    def __init__(self, events: AsyncIterator[Any]) -> None:
        self.last: dict[str, Any] = {"output_ids": [], "meta_info": {"finish_reason": None}}
        self.count = 0
        self._changed = asyncio.Condition()
        self._task = asyncio.create_task(self._read(events))

    async def _read(self, events: AsyncIterator[Any]) -> None:
        async for event in events:
            async with self._changed:
                self.last, self.count = event, self.count + 1
                self._changed.notify_all()

    async def tokens(self, count: int) -> None:
        """Waits until `count` tokens have come."""
        async with asyncio.timeout(CALL_DEADLINE_S), self._changed:
            await self._changed.wait_for(lambda: len(self.last["output_ids"]) >= count or self._task.done())
        assert len(self.last["output_ids"]) >= count

    async def finished(self) -> dict[str, Any]:
        """The last event, once the stream has ended."""
        async with asyncio.timeout(CALL_DEADLINE_S):
            await self._task
        return self.last

    async def hang_up(self) -> None:
        """Closes the connection in mid-stream."""
        self._task.cancel()
        await asyncio.wait([self._task])


def _decoded(reply: httpx.Response) -> Any:
    is_json = reply.headers.get("content-type", "").startswith("application/json")
    return reply.json() if is_json and reply.content else reply.text


# ---- engine processes --------------------------------------------------------------------------------------


@dataclass
class EngineProcess:
    """A CPU engine as a child process, and the address it printed."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it; returns its exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=30)
            raise


def start_engine(model: Path, *flags: str) -> EngineProcess:
    """Starts a CPU engine on a free port and waits for its ready line."""
    handle, name = tempfile.mkstemp(prefix="engine-", suffix=".log")
    command = [sys.executable, "-m", "milepost_engine", "--model", str(model), "--port", "0", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=handle, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    os.close(handle)
    assert process.stdout is not None
    deadline = threading.Timer(START_DEADLINE_S, process.kill)
    deadline.start()
    try:
        line = process.stdout.readline()
    finally:
        deadline.cancel()
    match = re.match(r"engine ready (http://\S+) model=\S+ dialect=\S+$", line.strip())
    if match is None:
        process.kill()
        process.wait(timeout=30)
        pytest.fail(f"the engine did not start: {line!r}\n{Path(name).read_text()[-3000:]}")
    return EngineProcess(process, match[1], Path(name))


@pytest.fixture(scope="session")
def engine_pool(model_dir: Path) -> Iterator[Callable[[str], EngineUnderTest]]:
    """Engines by dialect, started when first asked for."""
    running: dict[str, tuple[EngineProcess, EngineUnderTest]] = {}

    def get(dialect: str) -> EngineUnderTest:
        if dialect not in running:
            process = start_engine(model_dir, "--dialect", dialect, "--served-model-name", "tiny")
            running[dialect] = process, EngineUnderTest(process.url)
        return running[dialect][1]

    yield get
    died: list[str] = []
    for dialect, (process, _) in running.items():
        if (status := process.process.poll()) is not None:
            died.append(f"engine {dialect} ended by itself with {status}:\n{process.log.read_text()[-3000:]}")
        process.stop()
        process.process.stdout.close()
        process.log.unlink(missing_ok=True)
    assert not died, "\n".join(died)


@pytest.fixture(scope="session")
def launch(model_dir: Path) -> Iterator[Callable[..., EngineProcess]]:
    """Starts further engines that the test may kill; what it leaves running is ended."""
    started: list[EngineProcess] = []

    def start(*flags: str, model: Path | None = None) -> EngineProcess:
        started.append(start_engine(model or model_dir, *flags))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait(timeout=30)
        each.process.stdout.close()
        each.log.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def engine(engine_pool: Callable[[str], EngineUnderTest]) -> EngineUnderTest:
    """The engine under test: the one at MILEPOST_ENGINE_URL, else the CPU engine as 0.5.21."""
    url = os.environ.get("MILEPOST_ENGINE_URL")
    if url:
        given = EngineUnderTest(url, key=os.environ.get("MILEPOST_ENGINE_KEY", ""))
        given.warm_up()
        return given
    return engine_pool("0.5.21")


@pytest.fixture(scope="session", params=["0.5.17", "0.5.19", "0.5.21"])
def every_engine(
    request: pytest.FixtureRequest, engine_pool: Callable[[str], EngineUnderTest]
) -> EngineUnderTest:
    """One engine of each dialect; a given engine only as what it is."""
    url = os.environ.get("MILEPOST_ENGINE_URL")
    if not url:
        return engine_pool(request.param)
    given = EngineUnderTest(url, key=os.environ.get("MILEPOST_ENGINE_KEY", ""))
    if given.version != request.param:
        pytest.skip(f"the given engine is SGLang {given.version}, not {request.param}")
    return given


@pytest.fixture
async def client(engine: EngineUnderTest) -> AsyncIterator[EngineClient]:
    """A client of the engine under test; whatever the test left is ended."""
    async with engine.client() as client:
        yield client
        await _calm(client)


@pytest.fixture
async def every_client(every_engine: EngineUnderTest) -> AsyncIterator[EngineClient]:
    """A client of one engine of each dialect."""
    async with every_engine.client() as client:
        yield client
        await _calm(client)


async def _calm(client: EngineClient) -> None:
    await client.post("/abort_request", {"abort_all": True})
    await client.post("/continue_generation")

    await client.at_rest()


@pytest.fixture
async def weights_put_back(client: EngineClient, model_dir: Path) -> AsyncIterator[None]:
    """The engine has the model folder's weights again after the test."""
    yield
    await restore(client, model_dir)


async def restore(client: EngineClient, model_dir: Path) -> None:
    """Loads the model folder's weights under the version "default"."""
    async with client.updating():
        body = {"model_path": str(model_dir), "flush_cache": False, "weight_version": "default"}
        await client.post("/update_weights_from_disk", body)
