"""The arithmetic task on one GPU: SGLang and the trainer share it, and each dies once in the middle of it.

warm start -> milepost up (buffer, router, SGLang, rollout, trainer)
    each step: SGLang gives up KV cache and weights, the trainer takes its optimizer's state from the host
    and trains, SGLang takes its memory back and copies the weights from where they lie
-> kill -9 SGLang -> kill -9 the trainer -> rest -> evaluation, audit
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpu_loop import committed, held_out, kill_sglang, loop, step_rows, warm_start
from stack import Stack, until

STEPS, GROUPS = 80, 32
KILL_ENGINE, KILL_TRAINER = 20, 40


@pytest.mark.gpu(1)
@pytest.mark.timeout(560)
async def test_the_loop_learns_on_one_gpu_and_survives_kills(tmp_path: Path, out: Path) -> None:
    warm = warm_start(tmp_path, prompts=STEPS * GROUPS)
    with loop(
        tmp_path,
        warm,
        out,
        "colocated",
        groups=GROUPS,
        sglang={"enable_memory_saver": True},
        up={"engines": 1},
        rollout={"max_concurrent_samples": 512},
        rollout__evaluate={"prompts": str(tmp_path / "data" / "held_out.jsonl")},
        trainer={"offload": "optimizer"},
        trainer__schedule={"warmup_updates": 5},
        trainer__checkpoint={"every": 10},
        trainer__publish={
            "transport": "cuda_ipc",
            "wire_dtype": "bfloat16",
            "timeout_s": 30.0,
            "release_memory": ["kv_cache", "weights"],
            "memory_drain_s": 0.5,
            "memory_lease_s": 20.0,
        },
    ) as stack:
        await judge(stack, out)


async def judge(stack: Stack, out: Path) -> None:
    """Follows the run, kills, and says how it went."""
    async with stack.buffer() as buffer:
        await until(f"step {KILL_ENGINE}", lambda: committed(stack, buffer, KILL_ENGINE), within_s=150)
        kill_sglang(stack.service("engine-0")["pid"])
        await until(f"step {KILL_TRAINER}", lambda: committed(stack, buffer, KILL_TRAINER), within_s=150)
        await stack.kill("trainer")
        await stack.finished(buffer, within_s=150)
        result = await held_out(stack)
        audit, told = await stack.audited(buffer)
    rows = step_rows(stack)
    row = {
        "accuracy": result.reward_mean,
        "scored": result.num_scored,
        "accepted": audit.accepted,
        "trained": audit.trained,
        "max_staleness_seen": audit.max_staleness_seen,
        "problems": list(audit.problems),
        "audit": told,
        "step_s": [r.get("perf/step_time") for r in rows.values()],
        "update_s": [r.get("perf/update_weights_time") for r in rows.values()],
        "logprob_abs_diff": [r.get("train/train_rollout_logprob_abs_diff") for r in rows.values()],
        "ess": [r.get("train/mismatch_ess") for r in rows.values()],
    }
    (out / "loop-colocated.json").write_text(json.dumps(row))
    print(json.dumps({key: row[key] for key in list(row)[:7]}))
    assert audit.problems == ()
    assert (audit.accepted, audit.trained, audit.lost, audit.twice) == (STEPS * GROUPS, STEPS * GROUPS, 0, 0)
    assert "the audit closes" in told
    assert result.reward_mean >= 0.9
