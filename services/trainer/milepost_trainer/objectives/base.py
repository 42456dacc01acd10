"""What an objective is: advantages from rewards, then a token loss from log-probs.

    rewards of a group --advantages()--> [S] --packed--> token_loss(batch, scores) --> TokenLoss over [M]

Objectives are stateless. The backend multiplies ``loss`` with the token weights, so that an objective knows
nothing of ranks, micro-batches or averages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from milepost_trainer.batch import MicroBatch
from milepost_trainer.head import TokenScores

LossAggregation = Literal["token", "sequence"]


@dataclass(frozen=True)
class TokenLoss:
    """Loss of each predicted token, with what is worth reporting.

    Attributes:
        loss: float32 [M] with gradient.
        reports: name -> float32 [M] without gradient; metrics are their means over all predicted tokens.
    """

    loss: torch.Tensor
    reports: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])


class Objective(ABC):
    """A training algorithm."""

    @property
    def needs_reference(self) -> bool:
        """Whether token_loss reads ``MicroBatch.reference_logprobs``."""
        return False

    @property
    def needs_proximal(self) -> bool:
        """Whether token_loss reads ``MicroBatch.proximal_logprobs`` when a step makes several updates."""
        return False

    @abstractmethod
    def advantages(self, rewards: NDArray[np.float64]) -> NDArray[np.float32]:
        """Advantages of the samples of one group.

        Args:
            rewards: float64 [G].

        Returns:
            float32 [G].
        """

    @abstractmethod
    def token_loss(self, batch: MicroBatch, scores: TokenScores) -> TokenLoss:
        """Loss of each predicted token of a micro-batch, judged by itself: the LM head asks for the slope of
        a part of them while that part's logits exist. ``scores.entropy`` has no gradient."""


def token_weights(
    predicted: NDArray[np.int64], *, aggregation: LossAggregation, total_tokens: int, total_sequences: int
) -> NDArray[np.float32]:
    """Weight of every predicted token of each sequence, so that the loss is one weighted sum over all ranks.

    ``token`` (DAPO, arXiv 2503.14476, eq. 12): mean over all predicted tokens, so long answers weigh more.
    ``sequence`` (DeepSeekMath, arXiv 2402.03300, eq. 3): mean over a sequence's tokens, then over sequences.

    Args:
        predicted: int64 [S] predicted tokens of each sequence of this rank.
        aggregation: which mean.
        total_tokens: predicted tokens of all ranks.
        total_sequences: sequences of all ranks that have predicted tokens.

    Returns:
        float32 [S].
    """
    if aggregation == "token":
        return np.full(predicted.shape, 1.0 / max(1, total_tokens), dtype=np.float32)
    return (1.0 / (np.maximum(predicted, 1) * max(1, total_sequences))).astype(np.float32)
