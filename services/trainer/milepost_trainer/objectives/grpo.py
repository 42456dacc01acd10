"""GRPO with the options of DAPO.

Advantage of answer i in a group of G (DeepSeekMath, arXiv 2402.03300, section 4.1.2):
    A_i = (r_i - mean(r)) / std(r)      std of a sample (G - 1); std_normalisation = false leaves it out
Loss of token t, to be minimised (eq. 3; the upper clip of its own is DAPO's, arXiv 2503.14476, eq. 10):
    rho_t  = pi(o_t) / pi_old(o_t)
    loss_t = -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) + kl_coef KL_t
pi_old is the engine's own log-prob at the sampling temperature: nothing is recomputed.

Truncated importance sampling (``truncate_at`` > 0) splits the ratio in two, because engine and trainer
differ by numerics even on equal weights: clipping looks at pi / pi_proximal, and the whole is weighed by
min(pi_proximal / pi_engine, truncate_at). pi_proximal is the trainer's policy at the start of the step;
with one update a step that is pi itself, gradient stopped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from milepost_trainer.batch import MicroBatch
from milepost_trainer.head import TokenScores
from milepost_trainer.objectives.base import Objective, TokenLoss
from milepost_trainer.objectives.kl import KlEstimator, estimate_kl
from milepost_trainer.objectives.mismatch import mismatch_reports

_STD_EPS = 1e-6


@dataclass(frozen=True)
class Grpo(Objective):
    """Group-relative policy optimisation.

    Attributes:
        clip_low: how far below 1 the ratio counts.
        clip_high: how far above 1 the ratio counts.
        kl_coef: weight of the KL to the reference model; 0 needs no reference.
        kl_estimator: k1, k2 or k3.
        std_normalisation: divide advantages by the group's standard deviation.
        truncate_at: cap of the importance weight between trainer and engine; 0 turns it off.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    std_normalisation: bool = True
    truncate_at: float = 0.0

    @property
    def needs_reference(self) -> bool:
        """KL needs a reference."""
        return self.kl_coef > 0

    @property
    def needs_proximal(self) -> bool:
        """Truncated importance sampling compares with the step's first policy."""
        return self.truncate_at > 0

    def advantages(self, rewards: NDArray[np.float64]) -> NDArray[np.float32]:
        """Centre the group's rewards and, by default, divide by their deviation; a lone sample gets 0.

        A sample without reward (NaN) gets 0 and takes no part in mean and deviation.
        """
        known = np.isfinite(rewards)
        result = np.zeros(rewards.shape, dtype=np.float32)
        if known.sum() > 1:
            centred = rewards[known] - rewards[known].mean()
            spread = rewards[known].std(ddof=1) + _STD_EPS if self.std_normalisation else 1.0
            result[known] = centred / spread
        return result

    def token_loss(self, batch: MicroBatch, scores: TokenScores) -> TokenLoss:
        """Clipped surrogate, plus KL where asked for."""
        current = scores.logprobs
        old = batch.old_logprobs
        importance: torch.Tensor | None = None
        if self.truncate_at > 0:
            proximal = batch.proximal_logprobs if batch.proximal_logprobs is not None else current.detach()
            importance = (proximal - old).exp()
            old = proximal
        ratio = (current - old).exp()
        plain = ratio * batch.advantages
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * batch.advantages
        loss = -torch.minimum(plain, clipped)
        if importance is not None:
            loss = loss * importance.clamp(max=self.truncate_at)
        reports = {
            "pg_loss": loss,
            "pg_clipfrac": (clipped < plain).float(),
            "ppo_kl": old - current,
            "ois": ratio,
            **mismatch_reports(current, batch.old_logprobs),
        }
        if importance is not None:
            reports["tis"] = importance
            reports["tis_clipfrac"] = (importance > self.truncate_at).float()
        if self.kl_coef > 0:
            assert batch.reference_logprobs is not None, "the backend fills this in when needs_reference"
            kl = estimate_kl(current, batch.reference_logprobs, estimator=self.kl_estimator)
            loss = loss + self.kl_coef * kl
            reports["kl_loss"] = kl
        return TokenLoss(loss, {name: value.detach() for name, value in reports.items()})
