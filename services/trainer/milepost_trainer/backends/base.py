"""The interface between the step loop and a way of sharding a model.

    train_micro_batch * n -> step          one optimizer update
    gather_bucket * n                      weights for the engines, between updates
    save / load / export_hf                weights and optimizer for the disk

Every method is collective: all ranks call it, in the same order, with the same arguments but for their own
micro-batches. A backend owns parameters, optimizer and update counter, and nothing else; it is not
thread-safe, so one thread calls it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from milepost_trainer.batch import MicroBatch
from milepost_trainer.buckets import Bucket
from milepost_trainer.objectives.base import Objective
from milepost_trainer.world import World


@dataclass(frozen=True)
class StepResult:
    """One optimizer update.

    Attributes:
        grad_norm: global L2 norm of the gradients before clipping; may be inf or nan.
        learning_rate: the rate that was used.
        skipped: True when the norm was not finite: parameters and optimizer are as they were.
    """

    grad_norm: float
    learning_rate: float
    skipped: bool


@dataclass(frozen=True)
class MicroBatchResult:
    """What one rank's micro-batch contributed; sums, so that ranks and micro-batches add up.

    Attributes:
        loss: its share of the global loss.
        num_tokens: predicted tokens.
        sums: name -> sum over the predicted tokens.
    """

    loss: float
    num_tokens: int
    sums: Mapping[str, float]


class Backend(ABC):
    """A model under training, sharded somehow."""

    world: World
    vocab_size: int
    """Token ids are below it."""
    num_updates: int
    """Optimizer updates tried so far, the skipped ones included; the schedule follows it."""

    @abstractmethod
    def forward_logprobs(self, batch: MicroBatch, *, reference: bool = False) -> torch.Tensor:
        """Log-probs of the predicted tokens without gradients.

        Args:
            batch: what to score.
            reference: score under the frozen reference model instead.

        Returns:
            float32 [M], nats.
        """

    @abstractmethod
    def train_micro_batch(self, batch: MicroBatch, objective: Objective, *, last: bool) -> MicroBatchResult:
        """Forward, loss and backward; gradients add up until ``step``.

        Args:
            batch: this rank's micro-batch.
            objective: what to minimise.
            last: True for the last one before ``step``.
        """

    @abstractmethod
    def step(self) -> StepResult:
        """Clip, update the parameters at the scheduled rate, and clear the gradients."""

    @abstractmethod
    def plan_buckets(self, *, bucket_bytes: int, wire_dtype: str | None) -> tuple[Bucket, ...]:
        """How the weights are published; ``wire_dtype`` casts floating-point tensors."""

    @abstractmethod
    def gather_bucket(self, bucket: Bucket) -> torch.Tensor | None:
        """The bucket's bytes as one contiguous uint8 tensor on rank 0's device; None on other ranks."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write model, optimizer, counter and random state; every rank writes its share."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Read what ``save`` wrote, on any number of ranks."""

    @abstractmethod
    def export_hf(self, directory: Path) -> None:
        """Write a Hugging Face directory: config, safetensors, and the tokenizer's files."""
