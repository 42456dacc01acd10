"""Somebody else's task: their prompts, their reward in their own file, one command, no change to Milepost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

REWARD = '''
"""A reward of the user's own: how many of the response's characters are even digits."""


async def evens(sample):
    return sum(c in "02468" for c in sample.response) / max(1, len(sample.response))
'''


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_own_prompts_and_own_reward_train_with_one_command(start_stack, tmp_path: Path) -> None:
    prompts = [{"prompt": f"{i:02d}+", "metadata": {"i": i}} for i in range(16)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    stack = start_stack(
        "--feed",
        str(tmp_path / "mine.jsonl"),
        name="own",
        run={"reward": "my_rewards:evens"},
        rollout={"reward_path": [str(tmp_path)]},
    )
    assert stack.process.wait(400) == 0, stack.logs()
    rows = [json.loads(line) for line in (stack.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert any(0 < r["rollout/raw_reward"] < 1 for r in rows)
    assert (stack.run_dir / "final" / "model.safetensors").is_file()
