"""What the trainer tells, rank 0 for all ranks: its last step, what it does with its time, publications.

    StepLoop --step_metrics()--> metrics.jsonl, TensorBoard, WatchSteps, and these gauges: one vocabulary

Names under `train/`, `rollout/` and `perf/` are those that slime and Miles log for the same thing; Prometheus
shows their `/` as `_`. What they have no name for is under `milepost/step_`. No torch here, so that the
metrics reference can be written anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from milepost_common.metrics import Counter, Gauge, Histogram, Instrument, Kind, Spec


def _step(name: str, means: str, *, unit: str = "1", when_bad: str = "") -> Spec:
    return Spec(name, Kind.GAUGE, f"{means} (last step)", unit=unit, when_bad=when_bad)


STEP = (
    _step("train/loss", "loss that was minimised, mean over the step's updates", unit="nat"),
    _step("train/pg_loss", "its policy part: clipped and weighted, without the KL", unit="nat"),
    _step(
        "train/entropy_loss",
        "entropy of the policy, mean over predicted tokens",
        unit="nat",
        when_bad="falls to 0 early: the policy collapses; lower the rate, or add kl_coef",
    ),
    _step(
        "train/pg_clipfrac",
        "share of tokens whose ratio was clipped",
        when_bad="above 0.2 or so: updates are too large, or samples too stale",
    ),
    _step(
        "train/ppo_kl",
        "old minus current log-prob of the sampled tokens, mean",
        unit="nat",
        when_bad="grows with staleness and with updates_per_step; large from the first step on: engine and "
        "trainer disagree",
    ),
    _step("train/kl_loss", "KL to the reference model, not weighted; with kl_coef", unit="nat"),
    _step("train/ois", "probability ratio of current to old policy, mean over tokens"),
    _step("train/tis", "importance ratio of trainer to engine before its cap; with truncated sampling"),
    _step("train/tis_clipfrac", "share of tokens whose importance ratio was capped"),
    _step(
        "train/train_rollout_logprob_abs_diff",
        "distance of the trainer's log-probs from the engine's, mean over tokens",
        unit="nat",
        when_bad="above 0.05 at staleness 0: engine and trainer differ in numerics, weights or template",
    ),
    _step(
        "train/mismatch_k3_kl",
        "KL of the engine's policy to the trainer's, by the k3 estimator, mean over tokens",
        unit="nat",
        when_bad="above 0.01 at staleness 0: as above; growing with staleness: lower max_staleness",
    ),
    _step(
        "train/mismatch_ess",
        "effective sample size of the tokens under importance weights of trainer to engine, by their number",
        when_bad="below 0.9: samples are of another policy; truncated_importance_sampling, fresher samples",
    ),
    _step(
        "train/engine_logprob_abs_diff",
        "largest distance of an engine's log-probs from the trainer's right after publication; with "
        "debug.check_logprobs",
        unit="nat",
        when_bad="above debug.logprob_tolerance: weights did not arrive as sent, or numerics differ",
    ),
    _step(
        "train/grad_norm",
        "largest norm of a gradient before clipping",
        when_bad="spikes: see the step's transcripts; absent: it was not finite and the update was skipped",
    ),
    _step("train/lr-pg_0", "learning rate of the last update"),
    _step(
        "train/oom_retries",
        "how often part of the step was begun again because a rank ran out of memory",
        unit="retry",
        when_bad="once is enough to find a size that fits; step after step: lower max_tokens_per_micro_batch",
    ),
    _step(
        "rollout/raw_reward",
        "mean reward of the samples trained on",
        when_bad="flat: is the reward ever met, does it differ within groups?",
    ),
    _step(
        "rollout/raw_reward_std",
        "standard deviation of these rewards",
        when_bad="0: nothing to learn from; filter_equal_rewards, other prompts",
    ),
    _step("rollout/response_lengths", "tokens with loss of a sample, mean", unit="token"),
    _step("rollout/total_lengths", "tokens of a sample, prompt included, mean", unit="token"),
    _step("perf/step_time", "from the end of the step before to the end of this one", unit="s"),
    _step("perf/train_time", "forward, backward and optimizer", unit="s"),
    _step("perf/forward_backward_time", "forward and backward passes", unit="s"),
    _step("perf/optimizer_time", "clipping and moving the parameters", unit="s"),
    _step(
        "perf/train_wait_time",
        "waiting for the step's groups, their payloads and their packing",
        unit="s",
        when_bad="most of step_time: rollouts are the slow side, add engines or raise max_staleness",
    ),
    _step(
        "perf/data_fetch_time",
        "fetching payloads, with prefetch beside the step before",
        unit="s",
        when_bad="above step_time: the buffer's network is the slow side",
    ),
    _step("perf/data_preprocess_time", "decoding and packing them, likewise", unit="s"),
    _step("perf/wait_time_ratio", "share of the step that was waiting"),
    _step(
        "perf/update_weights_time",
        "publishing, as far as it held the step up",
        unit="s",
        when_bad="see milepost_transaction_seconds for the phase that is slow",
    ),
    _step("perf/save_model_time", "saving a checkpoint", unit="s"),
    _step("perf/offload_time", "moving state to the host and back, with trainer.offload", unit="s"),
    _step(
        "perf/max_memory_allocated_gb",
        "most device memory that tensors of one rank took at once in the step; nothing on the CPU",
        unit="GiB",
        when_bad="near the device's: max_tokens_per_micro_batch, activation checkpointing, trainer.offload",
    ),
    _step(
        "perf/max_memory_reserved_gb",
        "most device memory that torch took for them; nothing on the CPU",
        unit="GiB",
        when_bad="far above what was allocated: fragmentation; set "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
    ),
    _step("perf/cpu_memory_used_gb", "most host memory that the process of one rank took", unit="GiB"),
    _step("perf/actor_train_tok_per_s", "tokens of samples by train_time", unit="token/s"),
    _step("milepost/step_tokens_per_s", "tokens of samples by step_time: all in all", unit="token/s"),
    _step("milepost/step_staleness_mean", "staleness of the step's groups, mean", unit="step"),
    _step(
        "milepost/step_staleness_max",
        "largest staleness among the step's groups",
        unit="step",
        when_bad="at max_staleness all the time: rollouts run ahead as far as they may, as it should be; "
        "above it: report it",
    ),
    _step("milepost/step_groups", "groups", unit="group"),
    _step("milepost/step_samples", "samples", unit="sample"),
    _step("milepost/step_tokens", "predicted tokens, those with loss", unit="token"),
    _step("milepost/step_sample_tokens", "all tokens of the samples", unit="token"),
    _step("milepost/step_micro_batches", "forward and backward passes of a rank", unit="pass"),
    _step(
        "milepost/step_micro_batch_tokens",
        "most tokens that a micro-batch may hold; halved by each retry",
        unit="token",
    ),
    _step("milepost/step_updates", "optimizer updates", unit="update"),
    _step(
        "milepost/step_skipped_updates",
        "updates skipped for a gradient that was not finite",
        unit="update",
        when_bad="any: lower the rate, look at the step's transcripts",
    ),
    _step(
        "milepost/step_dropped_groups",
        "groups that the learner left out",
        unit="group",
        when_bad="any: the trainer's log says what is wrong with each",
    ),
    _step("milepost/step_weight_version", "weight version published last", unit="version"),
    _step("milepost/step_term", "the trainer's term", unit="term"),
    _step("milepost/step_replayed", "1 where the step was trained again after a crash"),
)  # fmt: skip
COMMITTED = Spec(
    "milepost_trainer_step", Kind.GAUGE, "newest step that was trained and committed", unit="step"
)
STEPS = Spec(
    "milepost_steps_trained",
    Kind.COUNTER,
    "steps trained by this process; replay: yes where a crash made it train them again",
    labels=("replay",),
    unit="step",
)
STALENESS = Spec(
    "milepost_group_staleness",
    Kind.HISTOGRAM,
    "staleness of every group trained on, replays left out",
    unit="step",
    bounds=(0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0),
)
PHASE_SECONDS = Spec(
    "milepost_trainer_seconds",
    Kind.COUNTER,
    "seconds by what the trainer did: starting, waiting (for groups), training, publishing, saving, paused, "
    "finished",
    labels=("phase",),
    unit="s",
    when_bad="waiting: rollouts are the slow side; publishing: see milepost_transaction_seconds; saving: the "
    "disk, or checkpoints too often",
)
PUBLISHER_SECONDS = Spec(
    "milepost_publisher_seconds",
    Kind.COUNTER,
    "seconds by what the publisher did: idle (everybody has the newest weights), publishing, waiting "
    "(engines lack weights and none can be given them)",
    labels=("state",),
    unit="s",
    when_bad="waiting: no engine, or publications fail; the trainer's log says why and when it tries again",
)
PUBLICATIONS = Spec(
    "milepost_publications",
    Kind.COUNTER,
    "attempts to give engines weights: published, failed, or nobody (no engine could take them)",
    labels=("outcome",),
    unit="attempt",
    when_bad="failed: tried again with a growing pause; milepost_transactions_total has the router's side",
)
PUBLISHED_BYTES = Spec(
    "milepost_published_bytes", Kind.COUNTER, "bytes of weights that were published", unit="By"
)
CHECKPOINT = Spec(
    "milepost_checkpoint_step",
    Kind.GAUGE,
    "step of the newest checkpoint",
    unit="step",
    when_bad="stands still while steps go on: the disk refuses, the trainer's log says how",
)
SPECS = (
    *STEP, COMMITTED, STEPS, STALENESS, PHASE_SECONDS, PUBLISHER_SECONDS, PUBLICATIONS, PUBLISHED_BYTES,
    CHECKPOINT,
)  # fmt: skip

PUBLISHED, FAILED, NOBODY = "published", "failed", "nobody"
IDLE, PUBLISHING, WAITING = "idle", "publishing", "waiting"


class StepMeter:
    """The last step as gauges, and all steps counted."""

    def __init__(self) -> None:
        self._gauges = {spec.name: Gauge(spec) for spec in STEP}
        self._steps, self._staleness = Counter(STEPS), Histogram(STALENESS)
        for replay in ("no", "yes"):
            self._steps.cell(replay)

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """What it tells."""
        return (*self._gauges.values(), self._steps, self._staleness)

    def trained(
        self, metrics: Mapping[str, float | None], *, staleness: Iterable[int], replayed: bool
    ) -> None:
        """A step was trained; a value that is missing or not finite is shown as NaN."""
        for name, gauge in self._gauges.items():
            if name in metrics:
                value = metrics[name]
                gauge.set(math.nan if value is None else value)
        self._steps.add("yes" if replayed else "no")
        for each in () if replayed else staleness:
            self._staleness.record(each)
