"""A whole stack under `milepost up`, on a model and data that the arithmetic example makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stack import ARITHMETIC, Stack, run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with random weights."""
    out = tmp_path_factory.mktemp("model")
    run(sys.executable, ARITHMETIC / "make_model.py", "--out", out)
    return out


StartStack = Callable[..., Stack]


@pytest.fixture
def start_stack(tmp_path: Path, model: Path) -> Iterator[StartStack]:
    """Starts stacks, and ends them whatever happens."""
    started: list[Stack] = []

    def start(*flags: str, name: str = "killed", **changes: Any) -> Stack:
        started.append(Stack.launch(tmp_path / name, model, *flags, **changes))
        return started[-1]

    yield start
    for stack in started:
        if stack.process.poll() is None:
            stack.stop()
