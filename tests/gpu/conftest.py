"""SGLang on a GPU, launched as a user launches it; skipped where there is no GPU or no SGLang.

Options of SGLang beside those below come from MILEPOST_SGLANG, a JSON object. Raw output goes to the folder
that MILEPOST_GPU_OUT names, if any.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from gpu_trainer import Fleet
from launched import Launched, free_port
from tiny_tokenizer import CHARACTERS, make_tokenizer

START_S = 300.0
OPTIONS: dict[str, Any] = {
    "mem_fraction_static": 0.2,
    "max_total_tokens": 65536,
    "max_running_requests": 64,
    "context_length": 2048,
    "cuda_graph_max_bs_decode": 16,
    "grammar_backend": "none",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run, and says why."""
    gpus = torch.cuda.device_count()
    for item in items:
        for mark in item.iter_markers("gpu"):
            needed = mark.args[0] if mark.args else 1
            if gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices; here are {gpus}"))
            elif importlib.util.find_spec("sglang") is None:
                item.add_marker(pytest.mark.skip(reason="needs SGLang: pip install sglang==0.5.21"))


def sglang_options(**changes: Any) -> dict[str, Any]:
    """What engines of these tests are launched with."""
    return OPTIONS | json.loads(os.environ.get("MILEPOST_SGLANG", "{}")) | changes


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where logs and raw output go."""
    given = os.environ.get("MILEPOST_GPU_OUT")
    folder = Path(given) if given else tmp_path_factory.mktemp("gpu")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_qwen3(path: Path, **shape: Any) -> Path:
    """Saves a random Qwen3 in bfloat16, and a tokenizer of characters."""
    torch.manual_seed(0)
    config = Qwen3Config(tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, **shape)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def gpu_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 whose heads are large enough for SGLang's kernels."""
    return save_qwen3(
        tmp_path_factory.mktemp("model") / "tiny-qwen3",
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.1,
    )


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the shape of Qwen3-0.6B."""
    return save_qwen3(
        tmp_path_factory.mktemp("model") / "qwen3-0.6b",
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )


@pytest.fixture(scope="module")
def launch_sglang(
    gpu_model: Path, out: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Launched]]:
    """Starts SGLang through its launcher; does not wait for it."""
    started: list[Launched] = []
    folder = tmp_path_factory.mktemp("launch")

    def start(name: str, *flags: str, model: Path = gpu_model, **options: Any) -> Launched:
        config = folder / f"{name}.toml"
        rows = [f"{key} = {json.dumps(value)}" for key, value in sglang_options(**options).items()]
        config.write_text("\n".join(["[engine.sglang]", *rows, ""]))
        argv = ["-m", "milepost_engine", "serve", "--config", str(config), "--backend", "sglang"]
        argv += ["--model", str(model), "--served-model-name", "tiny", "--port", free_port(), *flags]
        launched = Launched(out / f"{name}.log", *argv, start_s=START_S)
        started.append(launched)
        return launched

    yield start
    for each in started:
        each.end()


@pytest.fixture(scope="module")
def service(out: Path) -> Iterator[Callable[..., Launched]]:
    """Starts one of our services."""
    started: list[Launched] = []

    def start(module: str, *flags: str) -> Launched:
        launched = Launched(out / f"{module}.log", "-m", module, "serve", *flags)
        started.append(launched)
        return launched

    yield start
    for each in reversed(started):
        each.process.terminate()
        each.process.wait(timeout=20)
        each.end()


@pytest.fixture(scope="module")
def launch_bare(gpu_model: Path, out: Path) -> Iterator[Callable[..., tuple[Launched, str]]]:
    """Starts SGLang by itself, as somebody who knows nothing of Milepost does; returns it and its URL."""
    started: list[Launched] = []

    def start(name: str, **options: Any) -> tuple[Launched, str]:
        port = free_port()
        argv = ["-m", "sglang.launch_server", "--model-path", str(gpu_model), "--port", port]
        for key, value in sglang_options(**options).items():
            flag = "--" + key.replace("_", "-")
            argv += [flag] if value is True else [flag, str(value)]
        launched = Launched(out / f"{name}.log", *argv)
        started.append(launched)
        return launched, f"http://127.0.0.1:{port}"

    yield start
    for each in started:
        each.process.terminate()
        each.end()


@pytest.fixture(scope="module")
def start_fleet(
    launch_sglang: Callable[..., Launched],
    launch_bare: Callable[..., tuple[Launched, str]],
    service: Callable[..., Launched],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Fleet]:
    """Starts a buffer, a router and a launched engine; `bare`: and one known by its URL alone.

    `bare` may be the options of that one.
    """

    def start(*, bare: bool | dict[str, Any], **launch: Any) -> Fleet:
        options = bare if isinstance(bare, dict) else {}
        url = launch_bare("bare", **options)[1] if bare else ""
        data = tmp_path_factory.mktemp("redis")
        buffer = service("milepost_buffer", "--listen", "127.0.0.1:0", "--data_dir", str(data))
        buffer_at = buffer.address(buffer.ready(), "grpc")
        listen = ("--listen", "127.0.0.1:0", "--http_listen", "127.0.0.1:0")
        known = ("--engines", url) if bare else ()
        router = service("milepost_router", *listen, "--buffer", buffer_at, *known)
        line = router.ready()
        grpc, http = router.address(line, "grpc"), "http://" + router.address(line, "http")
        launched = launch_sglang("launched", "--router", grpc, "--engine-id", "launched", **launch)
        assert launched.ready(), launched.log.read_text()[-5000:]
        return Fleet(launched, url, buffer_at, grpc, http, f"gpu-{uuid.uuid4().hex[:8]}")

    return start
