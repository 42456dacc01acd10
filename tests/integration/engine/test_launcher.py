"""The launcher with real processes: another engine of ours stands where SGLang would, under a real router.

What it does not share with SGLang, a tree of processes on a GPU, is tested in tests/gpu.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from launched import DRIVER, Launched, free_port, runs
from milepost import RouterClient
from milepost.types import EngineState
from milepost_router.service import running
from milepost_router.settings import RouterSettings
from stack import until

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=4096,
        eos_token_id=1,
    )
    path = tmp_path_factory.mktemp("launched") / "tiny"
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def launch(model: Path, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def start(*flags: str, model: Path = model) -> Launched:
        port = free_port()
        launched = Launched(
            tmp_path / f"{len(started)}.log",
            "-c",
            DRIVER,
            port,
            "--model",
            str(model),
            "--port",
            port,
            *flags,
        )
        started.append(launched)
        return launched

    yield start
    for each in started:
        each.end()


@asynccontextmanager
async def _router() -> Any:
    """A router without a buffer, and its client."""
    settings = RouterSettings(
        listen="127.0.0.1:0",
        http_listen="127.0.0.1:0",
        buffer="",
        probe_interval_s=0.05,
        heartbeat_interval_s=0.2,
    )
    async with running(settings) as service, RouterClient(service.grpc_address) as client:
        yield service.grpc_address, client


async def test_a_server_that_dies_is_started_again_as_a_new_instance(launch):
    async with _router() as (address, router):
        launched = launch("--router", address, "--engine-id", "gpu-0")
        assert launched.ready().startswith("engine ready http://127.0.0.1:"), launched.log.read_text()

        async def serving(other_than: str = "") -> Any:
            engines = (await router.list_engines()).engines
            fresh = [e for e in engines if e.state is EngineState.SERVING and e.instance_id != other_than]
            return fresh[0] if fresh else None

        first = await until("the engine serves", serving, within_s=90)
        assert first.engine_id == "gpu-0"
        assert first.capabilities.gpu_uuids == ("GPU-1",)
        assert first.capabilities.engine == "milepost 0.5.21", "the router asked for the rest"
        server = launched.server()
        os.kill(server, signal.SIGKILL)
        again = await until("it serves again", lambda: serving(first.instance_id), within_s=120)
        assert again.url == first.url
        assert launched.server() != server
        launched.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(launched.process.wait, 60) == 0, launched.log.read_text()
        assert (await router.list_engines()).engines == (), "it left the router before it stopped"
    assert not any(runs(pid) for pid in launched.servers)


async def test_the_server_ends_with_a_launcher_that_is_killed(launch):
    launched = launch()
    url = launched.ready().split()[2]
    async with httpx.AsyncClient(timeout=60) as http:
        (state,) = (await http.get(url + "/server_info")).json()["internal_states"]
    assert state["tokens_generated"] >= 2, "its sampling was compiled before it was announced"
    server = launched.server()
    launched.process.kill()

    async def gone() -> bool:
        return not runs(server)

    await until("the server is gone", gone, within_s=60)


async def test_a_server_that_hangs_is_killed_and_started_again(launch):
    launched = launch("--hang-timeout-s", "4")
    assert launched.ready()
    server = launched.server()
    os.kill(server, signal.SIGSTOP)

    async def replaced() -> bool:
        children = launched.children()
        return bool(children) and server not in children

    await until("another server runs", replaced, within_s=120)
    launched.server()
    assert "has not answered" in launched.log.read_text()


def test_a_server_that_never_serves_ends_the_launcher_with_two(launch, tmp_path):
    launched = launch(model=tmp_path / "nowhere")
    assert launched.ready() == ""
    assert launched.process.wait(timeout=60) == 2
    assert "before it served" in launched.log.read_text()


def test_sglang_that_is_not_installed_is_told_with_the_remedy(model):
    command = [sys.executable, "-m", "milepost_engine", "serve", "--backend", "sglang", "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2, done.stderr
    assert "pip install sglang" in done.stderr


def test_the_launcher_loads_no_torch():
    code = "import sys, milepost_engine.launcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=100, check=False).returncode == 0
