"""The whole step on CUDA in bfloat16 over float32 weights, against the plain loop over the same sequences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from milepost_trainer.bench.plain import PlainLoop
from milepost_trainer.bench.run import plain_loop, trainer_loop
from milepost_trainer.learner import Learner
from milepost_trainer.objectives.build import build_objective
from milepost_trainer.service import build_learner
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.world import World, leave

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    shape: dict[str, Any] = {
        "vocab_size": 20011,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
    }
    Qwen3Config(**shape).save_pretrained(path)
    return path


def _settings(folder: Path, **changes: Any) -> TrainerSettings:
    bench = {"min_length": 50, "max_length": 900, "micro_batches": 3, "prompt_tokens": 20}
    common: dict[str, Any] = {
        "model_dir": str(folder),
        "initial_weights": "random",
        "device": "cuda",
        "compute_dtype": "bfloat16",
        "max_tokens_per_micro_batch": 4096,
        "bench": bench,
        "optimizer": {"lr": 1e-5},
    }
    return TrainerSettings(**(common | changes))


def _outcomes(loop: Any) -> list[tuple[float, float]]:
    found = []
    for step in range(1, 1 + STEPS):
        loop.stage(step)
        found.append(loop.update())
    return found


def _plain(settings: TrainerSettings) -> list[tuple[float, float]]:
    world = World(device=torch.device("cuda", 0))
    loop = PlainLoop(Path(settings.model_dir), settings, build_objective(settings.objective), world.device)
    return _outcomes(plain_loop(settings, loop, world, settings.max_tokens_per_micro_batch))


@pytest.fixture
def built() -> Iterator[list[tuple[World, Learner]]]:
    made: list[tuple[World, Learner]] = []
    yield made
    for world, _ in made:
        leave(world)


VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {"compile": "never"},
    "compiled": {"compile": "always"},
    "selective": {"compile": "always", "fsdp": {"activation_checkpointing": "selective"}},
    "full": {"compile": "always", "fsdp": {"activation_checkpointing": "full", "checkpoint_every": 2}},
    "small": {"compile": "never", "head_chunk_tokens": 333},
    "kept": {"compile": "never", "fsdp": {"reshard_after_forward": False}},
}


@pytest.fixture(scope="module")
def references(folder: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The plain loop in bfloat16, and in float32 throughout."""
    return _plain(_settings(folder)), _plain(_settings(folder, compute_dtype="float32"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_equals_the_plain_loop(
    folder: Path, variant: str, references: Any, built: list[tuple[World, Learner]]
) -> None:
    """Losses and gradient norms stray from those in float32 no further than the plain loop's in bfloat16."""
    settings = _settings(folder, **VARIANTS[variant])
    built.append(build_learner(settings))
    budget = 1500 if variant == "small" else None
    ours = _outcomes(trainer_loop(settings, built[0][1], max_tokens=budget))
    for step, (found, plain, exact) in enumerate(zip(ours, *references, strict=True)):
        slack = 2e-3 * (step + 1)  # later steps start from weights that differ by what the first ones added
        assert abs(found[0] - exact[0]) <= 1.5 * abs(plain[0] - exact[0]) + slack
        assert abs(found[1] - exact[1]) <= 1.5 * abs(plain[1] - exact[1]) + slack * exact[1]
