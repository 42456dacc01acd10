"""kill -9 of the trainer and of the gateway in mid-run: the run finishes, and the ledger closes.

One stack serves both kills. Judges: the order of the ledger before and after, the trainer's step log, and the
audit in both parts with the feeder's acknowledged ids and the step log as witnesses.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import psutil
import pytest

from stack import ARITHMETIC, MILEPOST, READY_S, Stack, run, until

PROMPTS = 20_000  # more than the run will train
BOUND = 3  # steps that may be filled without a gateway: max_staleness + 1


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


async def suspend_past_a_checkpoint(stack: Stack) -> int:
    """Suspends the trainer when it has trained steps that no checkpoint holds; returns the newest one's."""
    trainer = psutil.Process((await stack.ready("trainer"))["pid"])

    async def suspended() -> int:
        if trainer.status() != psutil.STATUS_STOPPED:
            trainer.suspend()
            return 0  # it stands still a moment later
        kept = max(checkpoints(stack), default=0)
        if max(trained_order(stack), default=0) > kept:
            return kept
        trainer.resume()
        return 0

    return await until("the trainer is between two checkpoints", suspended, within_s=READY_S)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_trainer_and_gateway_die_and_nothing_is_lost(start_stack, tmp_path: Path) -> None:
    run(sys.executable, ARITHMETIC / "make_data.py", "--out", tmp_path, "--train", str(PROMPTS))
    stack = start_stack("--stay")
    feeder = await stack.feed(tmp_path / "train.jsonl")
    async with stack.buffer() as buffer:
        await stack.goes_on(buffer, after=0, steps=10)
        kept = await suspend_past_a_checkpoint(stack)
        before = await stack.order(buffer)
        await stack.kill("trainer")

        step = await stack.goes_on(buffer, after=max(step for step, _ in before), steps=8)
        assert step > kept
        await stack.kill("rollout")
        await stack.goes_on(buffer, steps=BOUND + 1)

        await stack.finish(buffer, feeder)
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
    assert sorted(trained) == list(range(1, max(step for step, _ in after) + 1))
    assert audit.problems == ()
    assert (audit.trained, audit.in_flight, audit.lost, audit.twice) == (audit.accepted, 0, 0, 0)
    assert len(after) == audit.accepted
    assert audit.max_staleness_seen <= 2
    assert "acknowledged.jsonl, steps.jsonl" in report
    assert "lost 0, twice 0" in report
    assert "the audit closes" in report
    assert stack.stop() == 130
