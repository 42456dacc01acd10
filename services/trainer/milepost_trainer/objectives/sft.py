"""Supervised fine-tuning: the negative log-likelihood of the completion's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from milepost_trainer.batch import MicroBatch
from milepost_trainer.head import TokenScores
from milepost_trainer.objectives.base import Objective, TokenLoss


@dataclass(frozen=True)
class Sft(Objective):
    """Maximum likelihood; rewards and engine log-probs play no part."""

    def advantages(self, rewards: NDArray[np.float64]) -> NDArray[np.float32]:
        """All ones: every sequence counts alike."""
        return np.ones(rewards.shape, dtype=np.float32)

    def token_loss(self, batch: MicroBatch, scores: TokenScores) -> TokenLoss:
        """``-log p`` of each predicted token."""
        del batch
        return TokenLoss(-scores.logprobs)
