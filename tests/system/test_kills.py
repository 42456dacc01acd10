"""kill -9 of the trainer and of the gateway in mid-run: the run finishes, and the ledger closes.

One stack serves both kills. Judges: the order of the ledger before and after, the trainer's step log, and the
audit in both parts with the feeder's acknowledged ids and the step log as witnesses.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from stack import ARITHMETIC, MILEPOST, Stack, run, until

STEPS = 40
PROMPTS = 4 * STEPS


def checkpoints(stack: Stack) -> list[int]:
    """Steps of the checkpoints on disk."""
    metas = (stack.run_dir / "checkpoints").glob("*/meta.json")
    return sorted(json.loads(m.read_text())["step"] for m in metas)


def trained_order(stack: Stack) -> dict[int, list[list[str]]]:
    """step -> the ordered ids of each time that the trainer trained it."""
    seen: dict[int, list[list[str]]] = defaultdict(list)
    for line in (stack.run_dir / "steps.jsonl").read_text().splitlines():
        row = json.loads(line)
        seen[row["step"]].append(row["prompt_ids"])
    return seen


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_trainer_and_gateway_die_and_nothing_is_lost(start_stack, tmp_path: Path) -> None:
    run(sys.executable, ARITHMETIC / "make_data.py", "--out", tmp_path, "--train", str(PROMPTS))
    stack = start_stack("--feed", str(tmp_path / "train.jsonl"), "--stay")
    async with stack.buffer() as buffer:

        async def committed(step: int) -> bool:
            return (await stack.stats(buffer)).committed_step >= step

        await until("step 10 committed", lambda: committed(10), within_s=90)
        await stack.kill("trainer")
        before = await stack.order(buffer)
        kept = max(checkpoints(stack))

        await until("step 18 committed", lambda: committed(18), within_s=60)
        await stack.kill("rollout")

        async def finished() -> bool:
            return (await buffer.get_run(stack.run_id)).finished

        await until("the run is finished", finished, within_s=120)
        after = await stack.order(buffer)
        audit = await buffer.audit_ledger(stack.run_id)
        report = run(
            MILEPOST, "ledger", "--run", stack.run_id, "--buffer", buffer.address, "--audit",
            "--witness", stack.run_dir / "acknowledged.jsonl", "--witness", stack.run_dir / "steps.jsonl",
        )  # fmt: skip

    assert {k: v for k, v in after.items() if k in before} == before
    assert max(step for step, _ in before) > kept
    trained = trained_order(stack)
    again = {step: times for step, times in trained.items() if len(times) > 1}
    assert again, "the trainer died after a checkpoint and trained no step again"
    assert all(times[0] == times[-1] for times in again.values())
    assert sorted(trained) == list(range(1, STEPS + 1))
    assert audit.problems == ()
    assert (audit.accepted, audit.trained, audit.in_flight, audit.lost, audit.twice) == (
        PROMPTS, PROMPTS, 0, 0, 0,
    )  # fmt: skip
    assert audit.max_staleness_seen <= 2
    assert "acknowledged.jsonl, steps.jsonl" in report
    assert "lost 0, twice 0" in report
    assert "the audit closes" in report
    assert stack.stop() == 130
