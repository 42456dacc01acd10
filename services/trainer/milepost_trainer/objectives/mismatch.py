"""How far the trainer's policy is from the one that sampled, told and not trained on.

With d = log pi_trainer(o_t) - log pi_engine(o_t) and w = exp(d), over the tokens that the engine sampled:
    train_rollout_logprob_abs_diff   mean |d|
    mismatch_k3_kl                   mean(w - d - 1), of KL(pi_engine || pi_trainer); never negative
    mismatch_ess                     mean(w)^2 / mean(w^2): the share of the samples that importance weights
                                     leave (Kish's effective sample size by their number)
At staleness 0 this is numerics alone; with it, and with several updates a step, training has its part in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_WEIGHT, _SQUARE = "mismatch_weight", "mismatch_weight_squared"
_LARGEST = 20.0
"""Log-ratios count up to here, so that one broken token does not make every sum infinite."""


def mismatch_reports(current: torch.Tensor, sampled: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per token, from [M] log-probs of the trainer and of the engine."""
    difference = current.detach() - sampled
    near = difference.clamp(-_LARGEST, _LARGEST)
    return {
        "train_rollout_logprob_abs_diff": difference.abs(),
        "mismatch_k3_kl": near.exp() - near - 1,
        _WEIGHT: near.exp(),
        _SQUARE: (2 * near).exp(),
    }


def with_effective_size(means: Mapping[str, float]) -> dict[str, float]:
    """Means over all tokens of a step, with the effective sample size in place of what it is made of."""
    rest = {name: value for name, value in means.items() if name not in (_WEIGHT, _SQUARE)}
    if means.get(_SQUARE, 0.0) > 0:
        rest["mismatch_ess"] = means.get(_WEIGHT, 0.0) ** 2 / means[_SQUARE]
    return rest
