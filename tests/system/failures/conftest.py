"""Prompts without an end, and one stack under siege a module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos import Siege
from stack import ARITHMETIC, run

NUM_PROMPTS = 40_000  # more than any of these runs can train


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of many tensors: its weights travel in many buckets."""
    out = tmp_path_factory.mktemp("deep_model")
    run(
        sys.executable, ARITHMETIC / "make_model.py",
        "--out", out, "--hidden", "32", "--layers", "5", "--heads", "4",
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of prompts."""
    out = tmp_path_factory.mktemp("prompts")
    run(sys.executable, ARITHMETIC / "make_data.py", "--out", out, "--train", str(NUM_PROMPTS))
    return out / "train.jsonl"


@pytest.fixture(scope="module")
def siege(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, deep_model: Path, prompts: Path
) -> Iterator[Siege]:
    """One stack for all tests of a module, with weights by the module's `TRANSPORT`."""
    transport: str = request.module.TRANSPORT
    siege = Siege.start(tmp_path_factory.mktemp("siege") / "rows", deep_model, prompts, transport=transport)
    yield siege
    siege.end()
