"""Clients that are not Milepost's own, against real services: one `milepost up` for the tests of a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import ARITHMETIC, Stack, run

REWARD = '''
"""A quarter, and a tenth for each character of the response."""


def length(sample):
    return 0.25 + len(sample.response) / 10
'''


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arithmetic example's tiny model, with random weights."""
    out = tmp_path_factory.mktemp("interop") / "model"
    run(sys.executable, ARITHMETIC / "make_model.py", "--out", out)
    return out


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Stack]:
    """Every service, ready for prompts; the reward is `mine:length`."""
    folder = tmp_path_factory.mktemp("stack")
    (folder / "mine.py").write_text(REWARD)
    rewards = {"run": {"reward": "mine:length"}, "rollout": {"reward_path": [str(folder)]}}
    running = Stack.launch(folder / "interop", model, "--stay", **rewards)
    yield running
    running.stop()
