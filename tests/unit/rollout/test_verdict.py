"""What becomes of groups, for each policy."""

from __future__ import annotations

import numpy as np
import pytest

from milepost.types import DropReason, ErrorPolicy, Outcome, RunConfig, Sample
from milepost_rollout.verdict import Release, Seal, judge


def sample(index: int, outcome: Outcome = Outcome.COMPLETED, reward: float = 0.0) -> Sample:
    mask = np.array([0, 0 if outcome.is_error else 1], np.uint8)
    error = "why it failed" if outcome.is_error else ""
    reward = float("nan") if outcome.is_error else reward
    return Sample(index=index, outcome=outcome, reward=reward, error=error, loss_mask=mask)


ERRORS = [
    (Outcome.REWARD_ERROR, DropReason.REWARD_ERROR),
    (Outcome.ENV_ERROR, DropReason.ENV_ERROR),
    (Outcome.ENGINE_ERROR, DropReason.ENGINE_ERROR),
    (Outcome.ABORTED, DropReason.ENGINE_ERROR),
]


def test_a_good_group_is_sealed():
    samples = (sample(0, reward=1.0), sample(1, Outcome.TRUNCATED))
    assert judge(samples, RunConfig()) == Seal(samples=samples)


@pytest.mark.parametrize("policy", [ErrorPolicy.UNSPECIFIED, ErrorPolicy.RETRY])
@pytest.mark.parametrize("outcome, reason", ERRORS)
def test_retry_counts_a_failure(policy: ErrorPolicy, outcome: Outcome, reason: DropReason):
    verdict = judge([sample(0), sample(1, outcome)], RunConfig(error_policy=policy))
    assert isinstance(verdict, Release)
    assert verdict.failed
    assert (verdict.drop_reason, verdict.exhausted_reason) == (DropReason.UNSPECIFIED, reason)
    assert "why it failed" in verdict.detail


@pytest.mark.parametrize("outcome, reason", ERRORS)
def test_drop_drops_with_the_errors_reason(outcome: Outcome, reason: DropReason):
    verdict = judge([sample(0), sample(1, outcome)], RunConfig(error_policy=ErrorPolicy.DROP))
    assert isinstance(verdict, Release)
    assert (verdict.drop_reason, verdict.failed) == (reason, False)


def test_mask_seals_what_is_left():
    samples = [sample(0), sample(1, Outcome.REWARD_ERROR)]
    assert isinstance(judge(samples, RunConfig(error_policy=ErrorPolicy.MASK)), Seal)


def test_mask_has_nothing_to_seal_when_all_failed():
    samples = [sample(0, Outcome.REWARD_ERROR), sample(1, Outcome.REWARD_ERROR)]
    verdict = judge(samples, RunConfig(error_policy=ErrorPolicy.MASK))
    assert isinstance(verdict, Release)
    assert verdict.failed
    assert verdict.exhausted_reason is DropReason.REWARD_ERROR


def test_equal_rewards_are_filtered_when_asked():
    equal = [sample(0, reward=0.5), sample(1, reward=0.5)]
    verdict = judge(equal, RunConfig(filter_equal_rewards=True))
    assert isinstance(verdict, Release)
    assert verdict.drop_reason is DropReason.FILTER
    assert not verdict.failed
    assert isinstance(judge(equal, RunConfig()), Seal)


@pytest.mark.parametrize("rewards", [[0.5, 0.25], [0.5]])
def test_differing_rewards_and_single_samples_are_not_filtered(rewards: list[float]):
    samples = [sample(i, reward=r) for i, r in enumerate(rewards)]
    assert isinstance(judge(samples, RunConfig(filter_equal_rewards=True)), Seal)


def test_the_filter_looks_at_scored_samples_only():
    samples = [sample(0, reward=1.0), sample(1, reward=1.0), sample(2, Outcome.REWARD_ERROR)]
    config = RunConfig(filter_equal_rewards=True, error_policy=ErrorPolicy.MASK)
    verdict = judge(samples, config)
    assert isinstance(verdict, Release)
    assert verdict.drop_reason is DropReason.FILTER
