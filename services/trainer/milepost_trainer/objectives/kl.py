"""KL estimators from log-probs of sampled tokens (J. Schulman, "Approximating KL Divergence", 2020).

With ``d = reference - policy`` (nats), all estimate KL(policy || reference) from the policy's own samples:
  k1 = -d              unbiased, may be negative, high variance
  k2 = d^2 / 2         biased, low variance, its gradient is that of the true KL
  k3 = exp(d) - d - 1  unbiased, never negative; what DeepSeekMath subtracts (arXiv 2402.03300, eq. 4)
"""

from __future__ import annotations

from typing import Literal

import torch

KlEstimator = Literal["k1", "k2", "k3"]


def estimate_kl(
    logprobs: torch.Tensor, reference_logprobs: torch.Tensor, *, estimator: KlEstimator
) -> torch.Tensor:
    """Per-token KL estimate.

    Args:
        logprobs: [M] under the policy, with gradient.
        reference_logprobs: [M] under the reference.
        estimator: which formula.

    Returns:
        [M].
    """
    difference = reference_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return difference.exp() - difference - 1
