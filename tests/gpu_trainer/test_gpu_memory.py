"""A GPU that is really full: its allocator refuses in mid-pass, on one rank; and state in pinned memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rank_jobs import do_jobs, save_shape

SCALE, ROOM_MIB = 64, 512
PLAIN: dict[str, Any] = {"max_tokens_per_micro_batch": 1_000_000, "compile": "never"}
KEPT = PLAIN | {"fsdp": {"reshard_after_forward": False, "reduce_every_micro_batch": False}}
GAUGES = Path("gpu-memory.json")
DEADLINE_S = float(os.environ.get("MILEPOST_GPU_DEADLINE_S", "280"))

Report = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a model whose activations take a while of memory."""
    made = tmp_path_factory.mktemp("gpu-memory")
    wide = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    save_shape(
        made / "model", num_hidden_layers=6, intermediate_size=1024, max_position_embeddings=4096, **wide
    )
    return made


def launch(folder: Path, ranks: int, jobs: dict[str, dict[str, Any]]) -> dict[str, Report]:
    base = {"model_dir": str(folder / "model"), "steps": [1, 2], "scale": SCALE}
    described = [base | job | {"out": str(folder / f"{ranks}-{name}.pt")} for name, job in jobs.items()]
    for job in described:
        job["settings"] = {"optimizer": {"lr": 1e-3, "eps": 1e-2}} | job["settings"]
    done = do_jobs(described, ranks, timeout_s=DEADLINE_S, RANK_SCRIPT_DEVICE="cuda")
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: torch.load(folder / f"{ranks}-{name}.pt") for name in jobs}


def assert_same(ours: Report, theirs: Report) -> None:
    for mine, other in zip(ours["reports"], theirs["reports"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert (mine["tokens"], mine["skipped"]) == (other["tokens"], False)
    for name, tensor in ours["weights"].items():
        torch.testing.assert_close(tensor, theirs["weights"][name], rtol=0, atol=1e-4)


def tell(results: dict[str, Report]) -> None:
    """Numbers of all jobs, for whoever wants them beside the verdict."""
    keys = ("loss", "grad_norm", "oom_retries", "max_tokens", "micro_batches", "allocated")
    rows = {name: [{key: each[key] for key in keys} for each in r["reports"]] for name, r in results.items()}
    print(json.dumps(rows))
    if out := os.environ.get("MILEPOST_GPU_OUT"):
        (Path(out) / f"{len(rows)}-{GAUGES}").write_text(json.dumps(rows, indent=1))


@pytest.mark.timeout(300)
def test_one_gpu_that_is_full_and_state_in_pinned_memory(folder: Path) -> None:
    results = launch(
        folder,
        1,
        {
            "plain": {"settings": PLAIN},
            "full": {"settings": PLAIN, "room_mib": ROOM_MIB},
            "optimizer": {"settings": PLAIN | {"offload": "optimizer"}},
            "all": {"settings": PLAIN | {"offload": "all"}, "rest": True},
        },
    )
    tell(results)
    assert_same(results["full"], results["plain"])
    assert results["full"]["reports"][0]["oom_retries"] > 0
    assert results["full"]["reports"][0]["allocated"] < results["plain"]["reports"][0]["allocated"]
    for mode in ("optimizer", "all"):
        assert_same(results[mode], results["plain"])
        assert results[mode]["reports"][0]["oom_retries"] == 0


@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_of_two_gpus_is_full(folder: Path) -> None:
    results = launch(
        folder,
        2,
        {
            "plain": {"settings": PLAIN},
            "full": {"settings": PLAIN, "room_mib": ROOM_MIB},
            "kept": {"settings": KEPT},
            "kept-full": {"settings": KEPT, "room_mib": ROOM_MIB},
            "offload": {"settings": PLAIN | {"offload": "all"}, "rest": True},
        },
    )
    tell(results)
    for name in ("plain", "kept"):
        full = results["full" if name == "plain" else f"{name}-full"]
        assert_same(full, results[name])
        assert full["reports"][0]["oom_retries"] > 0
        assert full["reports"][0]["micro_batches"] > results[name]["reports"][0]["micro_batches"]
    assert_same(results["offload"], results["plain"])
