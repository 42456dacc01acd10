"""The arithmetic task on two GPUs: SGLang generates on one, a trainer on the other publishes over NCCL.

    warm start -> milepost up (buffer, router, SGLang on GPU 1, rollout, trainer on GPU 0)
        -> steps, trainer hardly waits -> kill -9 SGLang -> kill -9 the trainer -> rest -> evaluation, audit

The trainer computes in small micro-batches, so that it is the slower half, as it is with models that matter.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpu_loop import committed, held_out, kill_sglang, loop, step_rows, warm_start
from stack import Stack, until

STEPS, GROUPS = 80, 32
WARM, CLEAN, KILL_TRAINER = 10, 35, 50


def waiting(stack: Stack, first: int, last: int) -> float:
    """The part of wall time in which the trainer waited for samples."""
    chosen = [row for step, row in step_rows(stack).items() if first <= step <= last]
    return sum(r["perf/train_wait_time"] for r in chosen) / sum(r["perf/step_time"] for r in chosen)


@pytest.mark.gpu(2)
@pytest.mark.timeout(560)
async def test_the_loop_learns_over_nccl_and_survives_kills(tmp_path: Path, out: Path) -> None:
    warm = warm_start(tmp_path, prompts=STEPS * GROUPS)
    with loop(
        tmp_path,
        warm,
        out,
        "nccl",
        groups=GROUPS,
        sglang={"base_gpu_id": 1},
        up={"engines": 1},
        rollout={"max_concurrent_samples": 1024},
        rollout__evaluate={"prompts": str(tmp_path / "data" / "held_out.jsonl")},
        trainer={"max_tokens_per_micro_batch": 192},
        trainer__schedule={"warmup_updates": 5},
        trainer__checkpoint={"every": 10},
        trainer__publish={"transport": "nccl", "wire_dtype": "bfloat16", "timeout_s": 30.0},
    ) as stack:
        await judge(stack, out)


async def judge(stack: Stack, out: Path) -> None:
    """Follows the run, kills, and says how it went."""
    async with stack.buffer() as buffer:
        await until(f"step {CLEAN}", lambda: committed(stack, buffer, CLEAN), within_s=150)
        clean = waiting(stack, WARM, CLEAN)
        kill_sglang(stack.service("engine-0")["pid"])
        await until(f"step {KILL_TRAINER}", lambda: committed(stack, buffer, KILL_TRAINER), within_s=150)
        await stack.kill("trainer")
        await stack.finished(buffer, within_s=150)
        result = await held_out(stack)
        audit, told = await stack.audited(buffer)
    row = {
        "accuracy": result.reward_mean,
        "scored": result.num_scored,
        "waiting_once_warm": clean,
        "accepted": audit.accepted,
        "trained": audit.trained,
        "max_staleness_seen": audit.max_staleness_seen,
        "problems": list(audit.problems),
        "audit": told,
        "update_s": [r["perf/update_weights_time"] for r in step_rows(stack).values()],
    }
    (out / "loop-nccl.json").write_text(json.dumps(row))
    print(json.dumps({key: row[key] for key in row if key != "update_s"}))
    assert audit.problems == ()
    assert (audit.accepted, audit.trained, audit.lost, audit.twice) == (STEPS * GROUPS, STEPS * GROUPS, 0, 0)
    assert "the audit closes" in told
    assert result.reward_mean >= 0.9
    assert clean <= 0.05
