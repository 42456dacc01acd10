"""A whole run with three engines in one NCCL group, one killed in mid-broadcast: nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from gpu_loop import SGLANG, audited, committed, keep, kill_sglang, warm_start
from mid_broadcast import kill_one
from stack import Stack, until

STEPS, GROUPS = 60, 32
KILL, TIMEOUT_S = 8, 30.0
RUN = {
    "groups_per_step": GROUPS,
    "samples_per_prompt": 8,
    "max_staleness": 2,
    "lease_ttl_s": 60.0,
}


@pytest.mark.gpu(4)
@pytest.mark.timeout(560)
async def test_one_of_three_engines_dies_in_mid_broadcast_and_nothing_is_lost(
    tmp_path: Path, out: Path
) -> None:
    warm = warm_start(tmp_path, prompts=STEPS * GROUPS)
    options = json.loads(os.environ.get("MILEPOST_SGLANG", "{}"))
    stack = Stack.launch(
        tmp_path / "loop",
        warm,
        "--feed",
        str(tmp_path / "data" / "train.jsonl"),
        "--stay",
        run=RUN,
        up={"engines": 3, "engine_gpus": ["1", "2", "3"], "trainer_gpus": "0"},
        engine={"backend": "sglang", "shutdown_timeout_s": 20.0},
        engine__sglang=SGLANG | {k: v for k, v in options.items() if k != "disable_prefill_cuda_graph"},
        trainer={"max_tokens_per_micro_batch": 192},
        trainer__optimizer={"lr": 1e-4, "betas": [0.9, 0.95]},
        trainer__checkpoint={"every": 10},
        trainer__publish={"transport": "nccl", "wire_dtype": "bfloat16", "timeout_s": TIMEOUT_S},
    )
    try:
        await judge(stack, out)
    finally:
        stack.stop()
        keep(stack, out, "three")


async def judge(stack: Stack, out: Path) -> None:
    """Kills, follows the run to its end, and says how it went."""
    async with stack.buffer() as buffer:
        await until(f"step {KILL}", lambda: committed(stack, buffer, KILL), within_s=240)

        def kill() -> None:
            kill_sglang(stack.service("engine-1")["pid"])

        broken = await kill_one(stack, buffer, "engine-1", kill, engines=3, within_s=180)

        async def finished() -> bool:
            return (await buffer.get_run(stack.run_id)).finished

        await until("the run is finished", finished, within_s=150)
        audit, told = await audited(stack, buffer)
    row = {
        **dataclasses.asdict(broken),
        "deadline_s": TIMEOUT_S,
        "accepted": audit.accepted,
        "trained": audit.trained,
        "lost": audit.lost,
        "twice": audit.twice,
        "problems": list(audit.problems),
        "audit": told,
    }
    (out / "loop-three.json").write_text(json.dumps(row))
    print(json.dumps(row))
    assert audit.problems == ()
    assert (audit.accepted, audit.trained, audit.lost, audit.twice) == (STEPS * GROUPS, STEPS * GROUPS, 0, 0)
    assert "the audit closes" in told
    assert broken.given_up_s < TIMEOUT_S
    assert broken.restarted == ("engine-0", "engine-1", "engine-2")
