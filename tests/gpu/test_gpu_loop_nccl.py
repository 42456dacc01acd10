"""The arithmetic task on two GPUs: SGLang generates on one, a trainer on the other publishes over NCCL.

    warm start -> milepost up (buffer, router, SGLang on GPU 1, rollout, trainer on GPU 0)
        -> steps, trainer hardly waits -> kill -9 SGLang -> kill -9 the trainer -> rest -> evaluation, audit

The trainer computes in small micro-batches, so that it is the slower half, as it is with models that matter.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from launched import group_of
from milepost import RolloutClient
from milepost.errors import MilepostError
from stack import ARITHMETIC, MILEPOST, Stack, run, until, write_config

STEPS, GROUPS = 80, 32
WARM, CLEAN, KILL_TRAINER = 10, 35, 50
RUN = {
    "groups_per_step": GROUPS,
    "samples_per_prompt": 8,
    "max_staleness": 2,
    "lease_ttl_s": 60.0,
}
SGLANG: dict[str, Any] = {
    "base_gpu_id": 1,
    "dtype": "bfloat16",
    "mem_fraction_static": 0.1,
    "max_total_tokens": 100_000,
    "max_running_requests": 256,
    "context_length": 64,
    "disable_cuda_graph": True,
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
}


def warm_start(folder: Path) -> Path:
    """A model that is right three times in ten."""
    run(sys.executable, ARITHMETIC / "make_data.py", "--out", folder / "data", "--train", str(STEPS * GROUPS))
    shape = ("--hidden", "256", "--layers", "2", "--heads", "4")
    run(sys.executable, ARITHMETIC / "make_model.py", "--out", folder / "model", *shape)
    (folder / "sft").mkdir()
    config = write_config(
        folder / "sft",
        folder / "model",
        trainer__sft={
            "data": str(folder / "data" / "warm_start.jsonl"),
            "output_dir": str(folder / "warm"),
            "num_steps": 600,
            "batch_size": 128,
            "lr": 1e-3,
            "warmup_updates": 20,
        },
    )
    run(MILEPOST, "trainer", "sft", "--config", config, timeout_s=180)
    return folder / "warm"


def rows(stack: Stack) -> dict[int, dict[str, float]]:
    """What the trainer wrote of each step, the last time that it did."""
    path = stack.run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
            row = json.loads(line)
            if "perf/train_wait_time" in row:
                found[row["step"]] = row
    return found


def waiting(stack: Stack, first: int, last: int) -> float:
    """The part of wall time in which the trainer waited for samples."""
    chosen = [row for step, row in rows(stack).items() if first <= step <= last]
    return sum(r["perf/train_wait_time"] for r in chosen) / sum(r["perf/step_time"] for r in chosen)


@pytest.mark.gpu(2)
@pytest.mark.timeout(560)
async def test_the_loop_learns_over_nccl_and_survives_kills(tmp_path: Path, out: Path) -> None:
    warm = warm_start(tmp_path)
    options = json.loads(os.environ.get("MILEPOST_SGLANG", "{}"))
    stack = Stack.launch(
        tmp_path / "loop",
        warm,
        "--feed",
        str(tmp_path / "data" / "train.jsonl"),
        "--stay",
        run=RUN,
        up={"engines": 1},
        engine={"backend": "sglang", "shutdown_timeout_s": 20.0},
        engine__sglang=SGLANG | {k: v for k, v in options.items() if k != "disable_prefill_cuda_graph"},
        rollout={"max_concurrent_samples": 1024},
        rollout__evaluate={"prompts": str(tmp_path / "data" / "held_out.jsonl")},
        trainer={"max_tokens_per_micro_batch": 192},
        trainer__optimizer={"lr": 1e-4, "betas": [0.9, 0.95]},
        trainer__schedule={"warmup_updates": 5},
        trainer__checkpoint={"every": 10},
        trainer__publish={"transport": "nccl", "wire_dtype": "bfloat16", "timeout_s": 30.0},
    )
    try:
        await judge(stack, out)
    finally:
        stack.stop()
        for name in ("metrics.jsonl", "steps.jsonl"):
            with contextlib.suppress(OSError):
                (out / f"loop-nccl-{name}").write_bytes((stack.run_dir / name).read_bytes())
        (out / "loop-nccl-logs.txt").write_text(stack.logs())


def kill_sglang(launcher: int) -> None:
    """kill -9 of the whole server."""
    (server,) = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in group_of(int(server)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def judge(stack: Stack, out: Path) -> None:
    """Follows the run, kills, and says how it went."""
    async with stack.buffer() as buffer:

        async def committed(step: int) -> bool:
            if stack.process.poll() is not None:
                pytest.fail(stack.logs())
            with contextlib.suppress(MilepostError):
                return (await stack.stats(buffer)).committed_step >= step
            return False

        await until(f"step {CLEAN}", lambda: committed(CLEAN), within_s=150)
        clean = waiting(stack, WARM, CLEAN)
        kill_sglang(stack.service("engine-0")["pid"])
        await until(f"step {KILL_TRAINER}", lambda: committed(KILL_TRAINER), within_s=150)
        await stack.kill("trainer")

        async def finished() -> bool:
            return (await buffer.get_run(stack.run_id)).finished

        await until("the run is finished", finished, within_s=150)
        async with RolloutClient(stack.address("rollout")) as rollout:

            async def evaluated() -> Any:
                result = await rollout.evaluate()
                return result if result.num_scored == result.num_requested else None

            result = await until("one version was evaluated", evaluated, within_s=60)
        audit = await buffer.audit_ledger(stack.run_id)
        told = run(
            MILEPOST, "ledger", "--run", stack.run_id, "--buffer", buffer.address, "--audit",
            "--witness", stack.run_dir,
        )  # fmt: skip
    row = {
        "accuracy": result.reward_mean,
        "scored": result.num_scored,
        "waiting_once_warm": clean,
        "accepted": audit.accepted,
        "trained": audit.trained,
        "max_staleness_seen": audit.max_staleness_seen,
        "problems": list(audit.problems),
        "audit": told,
        "update_s": [r["perf/update_weights_time"] for r in rows(stack).values()],
    }
    (out / "loop-nccl.json").write_text(json.dumps(row))
    print(json.dumps({key: row[key] for key in row if key != "update_s"}))
    assert audit.problems == ()
    assert (audit.accepted, audit.trained, audit.lost, audit.twice) == (STEPS * GROUPS, STEPS * GROUPS, 0, 0)
    assert "the audit closes" in told
    assert result.reward_mean >= 0.9
    assert clean <= 0.05
