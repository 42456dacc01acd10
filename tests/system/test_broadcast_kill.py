"""Three engines in one group, one killed in mid-broadcast: all serve again, and nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from mid_broadcast import kill_one
from stack import ARITHMETIC, READY_S, run

ENGINES, TIMEOUT_S = 3, 20.0


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_one_of_three_engines_dies_in_mid_broadcast_and_nothing_is_lost(
    start_stack, tmp_path: Path
) -> None:
    run(sys.executable, ARITHMETIC / "make_data.py", "--out", tmp_path, "--train", "20000")
    publish = {"transport": "gloo", "bucket_bytes": 1, "timeout_s": TIMEOUT_S, "retry_delay_s": 0.3}
    stack = start_stack("--stay", name="three", up={"engines": ENGINES}, trainer__publish=publish)
    feeder = await stack.feed(tmp_path / "train.jsonl")
    async with stack.buffer() as buffer:
        await stack.goes_on(buffer, after=0, steps=2)

        def kill() -> None:
            os.kill(stack.service("engine-1")["pid"], signal.SIGKILL)

        broken = await kill_one(stack, buffer, "engine-1", kill, engines=ENGINES, within_s=READY_S)
        assert broken.given_up_s < TIMEOUT_S
        assert "engine-1" in broken.restarted
        await stack.goes_on(buffer, steps=2)
        await stack.finish(buffer, feeder)
        audit, told = await stack.audited(buffer)
    assert audit.problems == ()
    assert (audit.accepted, audit.lost, audit.twice) == (audit.trained, 0, 0)
    assert "the audit closes" in told
