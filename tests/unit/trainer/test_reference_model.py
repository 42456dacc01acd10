"""The frozen reference really pulls: KL to it falls where nothing else is asked for, and it never moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from milepost_trainer.backends.fsdp import FsdpBackend
from milepost_trainer.batch import TrainSequence
from milepost_trainer.learner import Learner, TrainGroup, UpdateReport
from milepost_trainer.objectives.build import build_objective
from milepost_trainer.plan import GroupInfo, plan_step
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.world import World


def learner_of(model_dir: Path, *, objective: dict[str, Any], **settings: Any) -> Learner:
    chosen = TrainerSettings.model_validate(
        {
            "model_dir": str(model_dir),
            "initial_weights": "random",
            "optimizer": {"lr": 3e-3},
            "objective": objective,
            **settings,
        }
    )
    made = build_objective(chosen.objective)
    return Learner(FsdpBackend(chosen, World(), with_reference=made.needs_reference), made)


def group(rewards: list[float]) -> TrainGroup:
    rng = np.random.default_rng(3)
    mask = np.array([0, 0, 1, 1, 1, 1], np.uint8)
    sequences = [
        TrainSequence(
            tokens=rng.integers(0, 16, 6).astype(np.int32),
            loss_mask=mask,
            logprobs=(np.full(6, -2.7) * mask).astype(np.float32),
        )
        for _ in rewards
    ]
    return TrainGroup(np.array(rewards), tuple(sequences))


def train(
    learner: Learner, groups: dict[str, TrainGroup], *, step: int, updates: int = 1
) -> list[UpdateReport]:
    infos = [GroupInfo(name, tuple(len(s.tokens) for s in g.sequences)) for name, g in groups.items()]
    plan = plan_step(step, infos, num_ranks=1, updates=updates, max_tokens=1000)
    assert not learner.start_step(plan, groups)
    reports: list[UpdateReport] = []
    for update in range(updates):
        for index in range(learner.start_update(update)):
            learner.train_micro_batch(index)
        reports.append(learner.finish_update())
    return reports


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_policy_is_pulled_to_another_reference(model_dir: Path, tmp_path: Path, estimator: str) -> None:
    torch.manual_seed(7)
    reference = tmp_path / "reference"
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir)).save_pretrained(reference)
    objective = {"kl_coef": 1.0, "kl_estimator": estimator}
    learner = learner_of(model_dir, objective=objective, reference_dir=str(reference))
    same_reward = {"g": group([1.0, 1.0, 1.0])}
    kl = [train(learner, same_reward, step=s)[0].means["kl_loss"] for s in range(1, 41)]
    assert kl[0] > 0
    assert kl[-1] < 0.1 * kl[0], "with equal rewards the loss is KL alone"


def test_without_a_folder_the_reference_is_the_initial_policy_and_stays_so(model_dir: Path) -> None:
    learner = learner_of(model_dir, objective={"kl_coef": 0.01})
    differing = {"g": group([1.0, 0.0, 0.5])}
    kl = [train(learner, differing, step=s)[0].means["kl_loss"] for s in range(1, 6)]
    assert kl[0] == pytest.approx(0, abs=1e-9)
    assert kl == sorted(kl)
    assert kl[-1] > 1e-5


def test_truncated_importance_sampling_clips_against_the_policy_at_the_start_of_the_step(
    model_dir: Path,
) -> None:
    """Engine log-probs far from the trainer's clip every token without it and none with it."""

    def clipped(**objective: float) -> list[float]:
        learner = learner_of(model_dir, objective=objective, optimizer={"lr": 1e-5})
        far = {name: group([1.0, 0.0, 0.5]) for name in ("a", "b")}
        for made in far.values():
            for sequence in made.sequences:
                np.copyto(sequence.logprobs, np.where(sequence.loss_mask, np.float32(-6), np.float32(0)))
        return [r.means["pg_clipfrac"] for r in train(learner, far, step=1, updates=2)]

    assert min(clipped()) > 0.2
    assert clipped(truncated_importance_sampling=2.0) == [0.0, 0.0]
