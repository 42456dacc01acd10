"""Settings -> objective."""

from __future__ import annotations

from milepost_trainer.objectives.base import Objective
from milepost_trainer.objectives.grpo import Grpo
from milepost_trainer.objectives.sft import Sft
from milepost_trainer.settings import ObjectiveSettings


def build_objective(settings: ObjectiveSettings) -> Objective:
    """The objective that the settings name."""
    if settings.algorithm == "sft":
        return Sft()
    return Grpo(
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        kl_coef=settings.kl_coef,
        kl_estimator=settings.kl_estimator,
        std_normalisation=settings.std_normalisation,
        truncate_at=settings.truncated_importance_sampling,
    )
