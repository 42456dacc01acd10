"""The metrics of a step, from what the loop measured and what the learner reports. Pure functions.

Times are wall seconds: `wait_s` blocked in LeaseStep and fetching, `train_s` forward, backward and optimizer,
`publish_s`, `checkpoint_s`, and `step_s` from the end of the step before to the end of this one. `tokens` are
predicted tokens (those with loss), `sample_tokens` all tokens of the samples; `tokens_per_s` counts the
latter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from milepost.types import StepGroup
from milepost_trainer.learner import UpdateReport


@dataclass(frozen=True)
class StepTimes:
    """Wall seconds of one step; see the module's docstring."""

    wait_s: float
    train_s: float
    publish_s: float
    checkpoint_s: float
    step_s: float


def step_metrics(
    *,
    groups: Sequence[StepGroup],
    updates: Sequence[UpdateReport],
    times: StepTimes,
    weight_version: int,
    term: int,
    dropped: int,
    replayed: bool,
    wall_time: float,
) -> dict[str, float | None]:
    """Metrics by name; None where there is no value."""
    rewards = np.array([r for group in groups for r in group.rewards if math.isfinite(r)])
    staleness = [group.staleness for group in groups]
    sample_tokens = sum(sum(group.num_tokens) for group in groups)
    tokens = sum(update.num_tokens for update in updates)
    return {
        "time": wall_time,
        "term": term,
        "loss": sum(update.loss for update in updates) / len(updates),
        "reward_mean": float(rewards.mean()) if rewards.size else None,
        "reward_std": float(rewards.std()) if rewards.size else None,
        "grad_norm": _finite(max(update.grad_norm for update in updates)),
        "lr": updates[-1].learning_rate,
        **_token_means(updates, tokens),
        "groups": len(groups),
        "samples": sum(len(group.num_tokens) for group in groups),
        "tokens": tokens,
        "sample_tokens": sample_tokens,
        "tokens_per_s": sample_tokens / times.step_s if times.step_s > 0 else None,
        "micro_batches": sum(update.num_micro_batches for update in updates),
        "updates": len(updates),
        "skipped_updates": sum(update.skipped for update in updates),
        "dropped_groups": dropped,
        "staleness_mean": sum(staleness) / len(staleness),
        "staleness_max": max(staleness),
        "weight_version": weight_version,
        "wait_s": times.wait_s,
        "train_s": times.train_s,
        "publish_s": times.publish_s,
        "checkpoint_s": times.checkpoint_s,
        "step_s": times.step_s,
        "replayed": float(replayed),
    }


def _token_means(updates: Sequence[UpdateReport], tokens: int) -> dict[str, float]:
    """Means over the tokens of all updates."""
    names = sorted({name for update in updates for name in update.means})
    return {
        name: sum(u.means.get(name, 0.0) * u.num_tokens for u in updates) / max(1, tokens) for name in names
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
