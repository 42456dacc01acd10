"""The arithmetic task with SGLang on GPUs: a warm start, a run that is watched and killed, and its judges."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from launched import group_of
from milepost import RolloutClient
from milepost.errors import MilepostError
from stack import ARITHMETIC, MILEPOST, Stack, run, until, write_config

SGLANG: dict[str, Any] = {
    "dtype": "bfloat16",
    "mem_fraction_static": 0.1,
    "max_total_tokens": 100_000,
    "max_running_requests": 256,
    "context_length": 64,
    "disable_cuda_graph": True,
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
}
"""For a small model and answers of a few tokens."""
SMALL = ("--hidden", "256", "--layers", "2", "--heads", "4")
"""2 million parameters."""


def warm_start(folder: Path, *, prompts: int, shape: Sequence[str] = SMALL) -> Path:
    """A model after 600 steps of SFT, the small one right three times in ten; its data beside it."""
    run(sys.executable, ARITHMETIC / "make_data.py", "--out", folder / "data", "--train", str(prompts))
    run(sys.executable, ARITHMETIC / "make_model.py", "--out", folder / "model", *shape)
    (folder / "sft").mkdir()
    table = {
        "data": str(folder / "data" / "warm_start.jsonl"),
        "output_dir": str(folder / "warm"),
        "num_steps": 600,
        "batch_size": 128,
        "lr": 1e-3,
        "warmup_updates": 20,
    }
    config = write_config(folder / "sft", folder / "model", trainer__sft=table)
    run(MILEPOST, "trainer", "sft", "--config", config, timeout_s=180)
    return folder / "warm"


@contextlib.contextmanager
def loop(
    folder: Path, warm: Path, out: Path, name: str, *, groups: int, sglang: Mapping[str, Any], **tables: Any
) -> Iterator[Stack]:
    """A run on what `warm_start` made; its records go to `out` under its name, also where it fails.

    Args:
      folder: of this test.
      warm: the model that it begins with.
      out: where records go.
      name: of this loop.
      groups: in each step.
      sglang: options beside those of all loops and MILEPOST_SGLANG.
      tables: of the configuration, in place of those below.
    """
    given = json.loads(os.environ.get("MILEPOST_SGLANG", "{}"))
    given.pop("disable_prefill_cuda_graph", None)  # these start without CUDA graphs of any kind
    usual: dict[str, Any] = {
        "run": {"groups_per_step": groups, "samples_per_prompt": 8, "max_staleness": 2, "lease_ttl_s": 60.0},
        "engine": {"backend": "sglang", "shutdown_timeout_s": 20.0},
        "engine__sglang": {**SGLANG, **sglang, **given},
        "trainer__optimizer": {"lr": 1e-4, "betas": [0.9, 0.95]},
    }
    feed = ("--feed", str(warm.parent / "data" / "train.jsonl"), "--stay")
    stack = Stack.launch(folder / "loop", warm, *feed, **(usual | tables))
    try:
        yield stack
    finally:
        stack.stop()
        keep(stack, out, name)


def step_rows(stack: Stack) -> dict[int, dict[str, Any]]:
    """What the trainer wrote of each step, the last time that it did."""
    path = stack.run_dir / "metrics.jsonl"
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
            row = json.loads(line)
            if "perf/step_time" in row:
                found[row["step"]] = row
    return found


def keep(stack: Stack, out: Path, name: str) -> None:
    """Its records and logs beside the verdict, also where it failed."""
    for file in ("metrics.jsonl", "steps.jsonl"):
        with contextlib.suppress(OSError):
            (out / f"loop-{name}-{file}").write_bytes((stack.run_dir / file).read_bytes())
    (out / f"loop-{name}-logs.txt").write_text(stack.logs())
    with contextlib.suppress(OSError):
        router = (stack.run_dir / "logs" / "router.log").read_text().splitlines()
        told = [line for line in router if "is served" in line]
        (out / f"loop-{name}-publications.txt").write_text("\n".join(told) + "\n")


def kill_sglang(launcher: int) -> None:
    """kill -9 of the whole server that a launcher started."""
    (server,) = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in group_of(int(server)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def committed(stack: Stack, buffer: Any, step: int) -> bool:
    """That step is in the ledger; fails with the logs where the stack has ended."""
    if stack.process.poll() is not None:
        pytest.fail(stack.logs())
    with contextlib.suppress(MilepostError):
        return (await stack.stats(buffer)).committed_step >= step
    return False


async def held_out(stack: Stack) -> Any:
    """An evaluation in which every prompt was scored under one version."""
    async with RolloutClient(stack.address("rollout")) as rollout:

        async def evaluated() -> Any:
            result = await rollout.evaluate()
            return result if result.num_scored == result.num_requested else None

        return await until("one version was evaluated", evaluated, within_s=60)
