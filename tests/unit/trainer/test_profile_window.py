"""The profiler's window: what a run leaves, read back."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milepost_trainer.backends.fsdp import FsdpBackend
from milepost_trainer.batch import TrainSequence
from milepost_trainer.learner import Learner, TrainGroup
from milepost_trainer.objectives.grpo import Grpo
from milepost_trainer.plan import GroupInfo, plan_step
from milepost_trainer.profiler import StepProfiler
from milepost_trainer.settings import ProfileSettings, TrainerSettings
from milepost_trainer.world import World


def train(model_dir: Path, window: ProfileSettings, *, steps: int) -> None:
    settings = TrainerSettings.model_validate({"model_dir": str(model_dir), "initial_weights": "random"})
    profiler = StepProfiler(window, rank=3, device=torch.device("cpu"))
    learner = Learner(FsdpBackend(settings, World()), Grpo(), profiler=profiler)
    rng = np.random.default_rng(0)
    mask = np.array([0, 0, 1, 1, 1, 1], np.uint8)
    sequences = tuple(
        TrainSequence(rng.integers(0, 16, 6).astype(np.int32), mask, np.full(6, -2.7, np.float32))
        for _ in range(4)
    )
    groups = {name: TrainGroup(rng.normal(size=4), sequences) for name in ("a", "b")}
    infos = [GroupInfo(name, (6,) * 4) for name in groups]
    for step in range(1, steps + 1):
        plan = plan_step(step, infos, num_ranks=1, updates=2, max_tokens=12)
        assert not learner.start_step(plan, groups)
        for update in range(2):
            learner.make_update(update)


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def test_a_trace_holds_the_steps_of_the_window_and_no_others(model_dir: Path, tmp_path: Path) -> None:
    train(model_dir, ProfileSettings(first_step=2, num_steps=2, dir=str(tmp_path / "p")), steps=5)
    (trace,) = (tmp_path / "p").iterdir()
    assert trace.name == "steps_00000002-00000003.rank_3.trace.json.gz"
    names = [event.get("name", "") for event in events(trace)]
    assert names.count("milepost::optimizer") == 2 * 2  # steps, updates
    assert names.count("milepost::micro_batch 0") == names.count("milepost::micro_batch 1") == 2 * 2
    assert "milepost::micro_batch 2" not in names
    assert "aten::mm" in names, "the operations themselves"


def test_no_window_no_files(model_dir: Path, tmp_path: Path) -> None:
    train(model_dir, ProfileSettings(dir=str(tmp_path / "never")), steps=1)
    train(model_dir, ProfileSettings(first_step=2, num_steps=2, dir=str(tmp_path / "cut")), steps=2)
    assert not (tmp_path / "never").exists()
    assert not (tmp_path / "cut").exists()
