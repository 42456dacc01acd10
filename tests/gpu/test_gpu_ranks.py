"""A trainer of several ranks and engines of several: a loop whose publications are judged by log-probs.

    over NCCL      ranks 0, 1 on GPUs 0, 1  --broadcast by rank 0-->  SGLang over GPUs 2, 3
    by cuda_ipc    ranks 0, 1 on GPUs 0, 1  --buckets of rank 0---->  SGLang on GPU 0, beside rank 0
                                                                      or over GPUs 0, 1, beside both

After every publication the engine generates, and the trainer's own forward pass, over all of its ranks, says
what those tokens are worth: a shard in another one's place would be off by nats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpu_loop import committed, loop, step_rows, warm_start
from stack import Stack, until

STEPS, GROUPS = 12, 16
TOLERANCE, STRAYING = 0.5, 2
"""In nats: bfloat16 in the engine against float32 costs some tenths of one, another's shard several. Of the
largest of sixteen tokens 3 % are above it from bfloat16 alone, so that some steps may stray."""


def case(name: str, *, gpus: int, **more: Any) -> Any:
    return pytest.param(more, id=name, marks=pytest.mark.gpu(gpus))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that all of them begin with."""
    return warm_start(tmp_path_factory.mktemp("warm"), prompts=STEPS * GROUPS)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "case",
    [
        case("nccl-2-to-2", gpus=4, transport="nccl", trainer="0,1", engine="2,3"),
        case("cuda_ipc-2-to-2", gpus=2, transport="cuda_ipc", trainer="0,1", engine="0,1"),
        case("nccl-1-to-2", gpus=3, transport="nccl", trainer="0", engine="1,2"),
        case("nccl-2-to-1", gpus=3, transport="nccl", trainer="0,1", engine="2"),
        case("cuda_ipc-2-to-1", gpus=2, transport="cuda_ipc", trainer="0,1", engine="0"),
        case("cuda_ipc-1-to-2", gpus=2, transport="cuda_ipc", trainer="0", engine="0,1"),
    ],
)
async def test_every_rank_of_an_engine_gets_the_weights_of_every_rank_of_the_trainer(
    case: dict[str, str], warm: Path, tmp_path: Path, out: Path, request: pytest.FixtureRequest
) -> None:
    ranks, shards = (len(case[who].split(",")) for who in ("trainer", "engine"))
    name = request.node.callspec.id
    with loop(
        tmp_path,
        warm,
        out,
        name,
        groups=GROUPS,
        sglang={"tp_size": shards, "disable_custom_all_reduce": True},
        up={"engines": 1, "engine_gpus": [case["engine"]], "trainer_gpus": case["trainer"]},
        trainer={"nproc": ranks, "num_steps": STEPS},
        trainer__debug={"check_logprobs": True, "logprob_tolerance": TOLERANCE},
        trainer__profile={"first_step": 4, "dir": str(tmp_path / "profile")},
        trainer__publish={"transport": case["transport"], "wire_dtype": "bfloat16", "timeout_s": 30.0},
    ) as stack:
        async with stack.buffer() as buffer:
            await until("the last step", lambda: committed(stack, buffer, STEPS), within_s=240)
            audit, _ = await stack.audited(buffer)
        await until("its record", lambda: recorded(stack, STEPS), within_s=30)
    rows = step_rows(stack)
    judged = {step: row.get("train/engine_logprob_abs_diff") for step, row in rows.items()}
    told = {
        "ranks": ranks,
        "shards": shards,
        "transport": case["transport"],
        "engine_logprob_abs_diff": judged,
        "train_rollout_logprob_abs_diff": [r["train/train_rollout_logprob_abs_diff"] for r in rows.values()],
        "update_s": [r["perf/update_weights_time"] for r in rows.values()],
    }
    profiles = {path.name: path.stat().st_size for path in (tmp_path / "profile").iterdir()}
    told["profiles"] = profiles
    (out / f"ranks-{name}.json").write_text(json.dumps(told))
    print(json.dumps(told))
    assert audit.problems == ()
    assert set(judged) == set(range(1, STEPS + 1))
    found = [worst for worst in judged.values() if worst is not None]
    assert len(found) >= STEPS - 2, f"steps whose weights were published at once: {judged}"
    assert sorted(found)[-1 - STRAYING] < TOLERANCE, judged
    assert len(profiles) == 2 * ranks, profiles  # of each rank a trace and the record of its allocations
    assert all(profiles.values())


async def recorded(stack: Stack, step: int) -> bool:
    """The trainer has written of a step."""
    return step in step_rows(stack)
