"""A whole run with three engines in one NCCL group, one killed in mid-broadcast: nothing is lost.

NCCL goes over sockets here, as between hosts without InfiniBand, and the model is a larger one: a broadcast
lasts long enough to be caught in its middle. Over NVLink it would be through within a millisecond or so.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gpu_loop import committed, kill_sglang, loop, warm_start
from mid_broadcast import kill_one
from stack import Stack, until

STEPS, GROUPS = 60, 32
KILL, TIMEOUT_S = 8, 30.0
SHAPE = ("--hidden", "1024", "--layers", "8", "--heads", "8")
"""126 million parameters."""
SOCKETS = {
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
}


@pytest.mark.gpu(4)
@pytest.mark.timeout(560)
async def test_one_of_three_engines_dies_in_mid_broadcast_and_nothing_is_lost(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SOCKETS.items():
        monkeypatch.setenv(name, value)
    warm = warm_start(tmp_path, prompts=STEPS * GROUPS, shape=SHAPE)
    with loop(
        tmp_path,
        warm,
        out,
        "three",
        groups=GROUPS,
        sglang={},
        up={"engines": 3, "engine_gpus": ["1", "2", "3"], "trainer_gpus": "0"},
        trainer={"max_tokens_per_micro_batch": 192},
        trainer__checkpoint={"every": 10},
        trainer__publish={"transport": "nccl", "wire_dtype": "bfloat16", "timeout_s": TIMEOUT_S},
    ) as stack:
        await judge(stack, out)


async def judge(stack: Stack, out: Path) -> None:
    """Kills, follows the run to its end, and says how it went."""
    async with stack.buffer() as buffer:
        await until(f"step {KILL}", lambda: committed(stack, buffer, KILL), within_s=240)

        def kill() -> None:
            kill_sglang(stack.service("engine-1")["pid"])

        broken = await kill_one(stack, buffer, "engine-1", kill, engines=3, within_s=180)
        await stack.finished(buffer, within_s=150)
        audit, told = await stack.audited(buffer)
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
