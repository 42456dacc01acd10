"""Objectives against the papers' formulas, computed on their own in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from milepost_trainer.batch import MicroBatch
from milepost_trainer.head import TokenScores
from milepost_trainer.layout import PackedLayout
from milepost_trainer.objectives.base import Objective, token_weights
from milepost_trainer.objectives.build import build_objective
from milepost_trainer.objectives.grpo import Grpo
from milepost_trainer.objectives.kl import estimate_kl
from milepost_trainer.objectives.mismatch import mismatch_reports, with_effective_size
from milepost_trainer.objectives.sft import Sft
from milepost_trainer.settings import ObjectiveSettings

# Three answers of 3, 1 and 2 tokens, with their policies' log-probs (nats).
LENGTHS = [3, 1, 2]
NEW = np.array([-0.2, -1.3, -0.7, -2.0, -0.4, -0.9])
OLD = np.array([-0.5, -1.0, -0.7, -1.2, -0.1, -1.6])
REF = np.array([-0.3, -1.1, -0.9, -1.9, -0.6, -0.8])
REWARDS = np.array([1.0, 0.0, 0.25])


def _micro(advantages: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> MicroBatch:
    count = len(NEW)
    index = torch.zeros(count, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.zeros(1, count, dtype=torch.int64),
        position_ids=torch.zeros(1, count, dtype=torch.int64),
        layout=PackedLayout.from_lengths(LENGTHS),
        source=index,
        target=index,
        temperature=None,
        old_logprobs=torch.from_numpy(OLD),
        advantages=torch.from_numpy(np.repeat(advantages, LENGTHS)),
        weights=torch.from_numpy(np.ones(count) if weights is None else weights),
        reference_logprobs=torch.from_numpy(REF),
    )


def _loss(objective: Objective, advantages: NDArray[np.float64]) -> tuple[torch.Tensor, torch.Tensor]:
    new = torch.from_numpy(NEW.copy()).requires_grad_()
    loss = objective.token_loss(_micro(advantages), TokenScores(new, None)).loss
    return loss, new


def _surrogate(advantage: float, ratio: float, low: float, high: float) -> float:
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.28), (0.05, 0.5)])
def test_grpo_of_deepseekmath(low: float, high: float) -> None:
    """Equation 3 with its mean over tokens, then answers; equation 4's KL inside."""
    beta = 0.04
    centred = REWARDS - REWARDS.sum() / 3
    deviation = np.sqrt((centred**2).sum() / 2)
    golden = 0.0
    position = 0
    for answer, length in enumerate(LENGTHS):
        inner = 0.0
        for _ in range(length):
            advantage = centred[answer] / (deviation + 1e-6)
            ratio = np.exp(NEW[position] - OLD[position])
            odds = np.exp(REF[position]) / np.exp(NEW[position])
            inner += _surrogate(advantage, ratio, low, high) - beta * (odds - np.log(odds) - 1)
            position += 1
        golden -= inner / length / len(LENGTHS)
    objective = Grpo(clip_low=low, clip_high=high, kl_coef=beta)
    loss, _ = _loss(objective, objective.advantages(REWARDS).astype(np.float64))
    weights = token_weights(np.array(LENGTHS), aggregation="sequence", total_tokens=6, total_sequences=3)
    total = (loss * torch.from_numpy(np.repeat(weights.astype(np.float64), LENGTHS))).sum().item()
    assert total == pytest.approx(golden, abs=1e-6)


def test_token_mean_of_dapo() -> None:
    """Equation 8 of DAPO: one mean over all tokens of all answers, no KL, clip-higher."""
    advantages = (REWARDS - REWARDS.mean()) / (REWARDS.std(ddof=1) + 1e-6)
    per_token = np.repeat(advantages, LENGTHS)
    ratios = np.exp(NEW - OLD)
    golden = -np.mean([_surrogate(a, r, 0.2, 0.28) for a, r in zip(per_token, ratios, strict=True)])
    loss, _ = _loss(Grpo(clip_low=0.2, clip_high=0.28), advantages)
    weights = token_weights(np.array(LENGTHS), aggregation="token", total_tokens=6, total_sequences=3)
    total = (loss * torch.from_numpy(np.repeat(weights.astype(np.float64), LENGTHS))).sum().item()
    assert total == pytest.approx(golden, abs=1e-6)


def test_the_gradient_vanishes_only_where_the_clip_binds() -> None:
    advantages = np.array([1.0, -1.0, 1.0])
    loss, new = _loss(Grpo(clip_low=0.2, clip_high=0.28), advantages)
    loss.sum().backward()
    ratios = np.exp(NEW - OLD)
    signs = np.repeat(advantages, LENGTHS)
    bound = ((signs > 0) & (ratios > 1.28)) | ((signs < 0) & (ratios < 0.8))
    assert bound.any()
    assert not bound.all()
    assert new.grad is not None
    np.testing.assert_allclose(new.grad.numpy(), np.where(bound, 0.0, -ratios * signs), atol=1e-12)


def test_advantages_without_std_are_only_centred() -> None:
    plain = Grpo(std_normalisation=False).advantages(REWARDS)
    np.testing.assert_allclose(plain, REWARDS - REWARDS.mean(), atol=1e-7)


def test_advantages_of_equal_rewards_and_lone_samples_are_zero() -> None:
    assert Grpo().advantages(np.array([0.5, 0.5, 0.5])).tolist() == [0, 0, 0]
    assert Grpo().advantages(np.array([3.0])).tolist() == [0]


def test_a_sample_without_reward_takes_no_part() -> None:
    with_hole = Grpo().advantages(np.array([1.0, np.nan, 0.0]))
    np.testing.assert_allclose(with_hole[[0, 2]], Grpo().advantages(np.array([1.0, 0.0])))
    assert with_hole[1] == 0


def test_kl_estimators() -> None:
    new, ref = torch.from_numpy(NEW), torch.from_numpy(REF)
    odds = np.exp(REF - NEW)
    np.testing.assert_allclose(estimate_kl(new, ref, estimator="k1"), NEW - REF, atol=1e-12)
    np.testing.assert_allclose(estimate_kl(new, ref, estimator="k2"), (NEW - REF) ** 2 / 2, atol=1e-12)
    np.testing.assert_allclose(estimate_kl(new, ref, estimator="k3"), odds - 1 - np.log(odds), atol=1e-12)


@given(st.integers(0, 2**31))
def test_k1_and_k3_estimate_the_true_kl(seed: int) -> None:
    """Weighted by the policy's probabilities over the whole vocabulary, both are exact."""
    rng = np.random.default_rng(seed)
    policy, reference = (np.log(rng.dirichlet(np.ones(6))) for _ in range(2))
    true = (np.exp(policy) * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        values = estimate_kl(
            torch.from_numpy(policy), torch.from_numpy(reference), estimator=estimator
        ).numpy()
        assert (np.exp(policy) * values).sum() == pytest.approx(true, abs=1e-9)


def test_truncated_importance_sampling() -> None:
    """With one update a step: unit ratio, weighed by the capped ratio between trainer and engine."""
    advantages = np.array([0.5, -1.0, 2.0])
    loss, new = _loss(Grpo(truncate_at=1.2), advantages)
    loss.sum().backward()
    capped = np.minimum(np.exp(NEW - OLD), 1.2)
    golden = -capped * np.repeat(advantages, LENGTHS)
    np.testing.assert_allclose(loss.detach().numpy(), golden, atol=1e-12)
    assert new.grad is not None
    np.testing.assert_allclose(new.grad.numpy(), golden, atol=1e-12)


def test_mismatch_of_trainer_and_engine() -> None:
    """By their formulas in float64; Kish's effective sample size, by the number of tokens."""
    new = torch.from_numpy(NEW.copy()).requires_grad_()
    reports = Grpo().token_loss(_micro(np.ones(3)), TokenScores(new, None)).reports
    means = with_effective_size({name: float(value.mean()) for name, value in reports.items()})
    difference = NEW - OLD
    weights = np.exp(difference)
    assert means["train_rollout_logprob_abs_diff"] == pytest.approx(np.abs(difference).mean())
    assert means["mismatch_k3_kl"] == pytest.approx((weights - difference - 1).mean())
    effective = weights.sum() ** 2 / (weights**2).sum()
    assert means["mismatch_ess"] == pytest.approx(effective / len(NEW))
    assert 0 < means["mismatch_ess"] < 1
    assert not any("weight" in name for name in means)
    assert all(not value.requires_grad for value in reports.values())


def test_a_policy_that_is_the_engines_loses_no_sample() -> None:
    sampled = torch.from_numpy(OLD)
    means = with_effective_size(
        {name: float(value.mean()) for name, value in mismatch_reports(sampled, sampled).items()}
    )
    assert (means["mismatch_ess"], means["mismatch_k3_kl"]) == (1.0, 0.0)


def test_a_broken_token_leaves_numbers_finite() -> None:
    reports = mismatch_reports(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]))
    assert all(bool(value.isfinite().all()) for value in reports.values())
    assert with_effective_size({"loss": 1.0}) == {"loss": 1.0}


def test_sft_is_the_negative_log_likelihood() -> None:
    loss, _ = _loss(Sft(), np.ones(3))
    np.testing.assert_allclose(loss.detach().numpy(), -NEW)


def test_settings_choose_the_objective() -> None:
    assert isinstance(build_objective(ObjectiveSettings(algorithm="sft")), Sft)
    made = build_objective(ObjectiveSettings(clip_high=0.5, kl_coef=0.1, kl_estimator="k2"))
    assert made == Grpo(clip_high=0.5, kl_coef=0.1, kl_estimator="k2")
    assert made.needs_reference
    assert not build_objective(ObjectiveSettings()).needs_reference
