"""The step equals a plain loop's in float32: Hugging Face model, all logits, autograd, torch's AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from milepost_trainer.bench.plain import PlainLoop
from milepost_trainer.bench.run import Loop, plain_loop, trainer_loop
from milepost_trainer.objectives.build import build_objective
from milepost_trainer.service import build_learner
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.world import World

STEPS = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "as-is": {},
    "head-in-chunks": {"head_chunk_tokens": 17},
    "selective": {"fsdp": {"activation_checkpointing": "selective"}},
    "full": {"fsdp": {"activation_checkpointing": "full"}},
    "by-sequence": {"objective": {"loss_aggregation": "sequence"}},
    "importance": {"objective": {"truncated_importance_sampling": 2.0}},
}


def _settings(model_dir: Path, **changes: Any) -> TrainerSettings:
    bench = {"min_length": 5, "max_length": 60, "micro_batches": 3, "prompt_tokens": 3}
    common: dict[str, Any] = {
        "model_dir": str(model_dir),
        "initial_weights": "random",
        "device": "cpu",
        "max_tokens_per_micro_batch": 256,
        "bench": bench,
        "optimizer": {"lr": 3e-3},
    }
    return TrainerSettings(**(common | changes))


def _outcomes(loop: Loop) -> torch.Tensor:
    """Loss and gradient norm of each step; every step starts from the weights that the last one left."""
    found: list[tuple[float, float]] = []
    for step in range(1, 1 + STEPS):
        loop.stage(step)
        found.append(loop.update())
    return torch.tensor(found)


def _plain(settings: TrainerSettings, max_tokens: int) -> torch.Tensor:
    loop = PlainLoop(
        Path(settings.model_dir), settings, build_objective(settings.objective), torch.device("cpu")
    )
    return _outcomes(plain_loop(settings, loop, World(), max_tokens))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_tokens", [256, 100])
def test_step_equals_the_plain_loop(model_dir: Path, variant: str, max_tokens: int) -> None:
    settings = _settings(model_dir, **VARIANTS[variant])
    _, learner = build_learner(settings)
    ours = _outcomes(trainer_loop(settings, learner, max_tokens=max_tokens))
    torch.testing.assert_close(ours, _plain(settings, 256), rtol=2e-5, atol=2e-6)


def test_the_comparison_can_fail(model_dir: Path) -> None:
    """The control: another clipping range is another loss."""
    tight = _settings(model_dir, objective={"clip_low": 0.01, "clip_high": 0.01})
    _, learner = build_learner(tight)
    ours = _outcomes(trainer_loop(tight, learner))
    assert (ours - _plain(_settings(model_dir), 256)).abs().max() > 1e-3
