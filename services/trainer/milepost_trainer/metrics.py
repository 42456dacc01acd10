"""The metrics of a step, from what the loop measured and what the learner reports. Pure functions.

One vocabulary for metrics.jsonl, TensorBoard, WatchSteps and Prometheus; `meters.STEP` says what each name
means. Times are wall seconds of rank 0, memory is that of the rank with most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from milepost.types import StepGroup
from milepost_trainer.learner import UpdateReport
from milepost_trainer.objectives.mismatch import with_effective_size
from milepost_trainer.timing import StepTimes


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
    samples = sum(len(group.num_tokens) for group in groups)
    tokens = sum(update.num_tokens for update in updates)
    return {
        "time": wall_time,
        "train/loss": sum(update.loss for update in updates) / len(updates),
        "train/grad_norm": _finite(max(update.grad_norm for update in updates)),
        "train/lr-pg_0": updates[-1].learning_rate,
        "train/oom_retries": sum(update.oom_retries for update in updates),
        **{f"train/{name}": value for name, value in _token_means(updates, tokens).items()},
        "rollout/raw_reward": float(rewards.mean()) if rewards.size else None,
        "rollout/raw_reward_std": float(rewards.std()) if rewards.size else None,
        "rollout/response_lengths": sum(group.num_loss_tokens for group in groups) / samples,
        "rollout/total_lengths": sample_tokens / samples,
        "perf/step_time": times.step_s,
        "perf/train_time": times.train_s,
        "perf/forward_backward_time": times.forward_backward_s,
        "perf/optimizer_time": times.optimizer_s,
        "perf/train_wait_time": times.wait_s,
        "perf/data_fetch_time": times.fetch_s,
        "perf/data_preprocess_time": times.pack_s,
        "perf/wait_time_ratio": _rate(times.wait_s, times.step_s),
        "perf/update_weights_time": times.publish_s,
        "perf/save_model_time": times.checkpoint_s,
        "perf/offload_time": sum(update.offload_s for update in updates),
        "perf/max_memory_allocated_gb": _gib(max(update.peaks.allocated for update in updates)),
        "perf/max_memory_reserved_gb": _gib(max(update.peaks.reserved for update in updates)),
        "perf/cpu_memory_used_gb": _gib(max(update.peaks.process for update in updates)),
        "perf/actor_train_tok_per_s": _rate(sample_tokens, times.train_s),
        "milepost/step_tokens_per_s": _rate(sample_tokens, times.step_s),
        "milepost/step_staleness_mean": sum(staleness) / len(staleness),
        "milepost/step_staleness_max": max(staleness),
        "milepost/step_groups": len(groups),
        "milepost/step_samples": samples,
        "milepost/step_tokens": tokens,
        "milepost/step_sample_tokens": sample_tokens,
        "milepost/step_micro_batches": sum(update.num_micro_batches for update in updates),
        "milepost/step_micro_batch_tokens": updates[-1].max_tokens,
        "milepost/step_updates": len(updates),
        "milepost/step_skipped_updates": sum(update.skipped for update in updates),
        "milepost/step_dropped_groups": dropped,
        "milepost/step_weight_version": weight_version,
        "milepost/step_term": term,
        "milepost/step_replayed": float(replayed),
    }


def shortage_notes(updates: Sequence[UpdateReport]) -> dict[str, int]:
    """What the step log says of a step in which a rank ran out of memory; nothing of any other."""
    retries = sum(update.oom_retries for update in updates)
    return {"oom_retries": retries, "micro_batch_tokens": updates[-1].max_tokens} if retries else {}


def _token_means(updates: Sequence[UpdateReport], tokens: int) -> dict[str, float]:
    """Means over the tokens of all updates."""
    names = sorted({name for update in updates for name in update.means})
    means = {
        name: sum(u.means.get(name, 0.0) * u.num_tokens for u in updates) / max(1, tokens) for name in names
    }
    return with_effective_size(means)


def _gib(size_bytes: int) -> float | None:
    return size_bytes / 2**30 if size_bytes else None


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
