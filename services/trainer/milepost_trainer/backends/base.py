"""The interface between the step loop and a way of sharding a model.

    attempt(train_micro_batch) * n -> step one optimizer update; after discard its micro-batches come again
    gather_bucket * n                      weights for the engines, between updates
    save / load / export_hf                weights and optimizer for the disk

Every method is collective: all ranks call it, in the same order, with the same arguments but for their own
micro-batches. A backend owns parameters, optimizer and update counter, and nothing else; it is not
thread-safe, so one thread calls it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from milepost_trainer.batch import MicroBatch
from milepost_trainer.buckets import Bucket
from milepost_trainer.objectives.base import Objective
from milepost_trainer.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """One optimizer update.

    Attributes:
        grad_norm: global L2 norm of the gradients before clipping; may be inf or nan.
        learning_rate: the rate that was used.
        skipped: True when the norm was not finite: parameters and optimizer are as they were.
        retries: how often it was begun again for want of memory; ranks add up.
    """

    grad_norm: float
    learning_rate: float
    skipped: bool
    retries: int = 0


@dataclass(frozen=True)
class MicroBatchResult:
    """What one rank's micro-batch contributed; sums, so that ranks and micro-batches add up.

    The device may still be at work on the numbers: whoever asks for the first waits for it, so ask when the
    update is over, and the device never waits for the host between two micro-batches.

    Attributes:
        num_tokens: predicted tokens.
        names: of the sums.
        values: float64 [1 + names] on the device, the loss first; None for nothing but zeros.
    """

    num_tokens: int
    names: tuple[str, ...] = ()
    values: torch.Tensor | None = None

    @cached_property
    def loss(self) -> float:
        """Its share of the global loss."""
        return self._read[0]

    @cached_property
    def sums(self) -> Mapping[str, float]:
        """Name -> sum over the predicted tokens."""
        return dict(zip(self.names, self._read[1:], strict=True))

    @cached_property
    def _read(self) -> list[float]:
        return [0.0] * (1 + len(self.names)) if self.values is None else self.values.tolist()


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
    def attempt(self, work: Callable[[MicroBatch], T], batch: MicroBatch) -> T | None:
        """Make a pass that may run out of memory on this rank alone, and keep the ranks in step if it does.

        Args:
            work: calls ``forward_logprobs`` and ``train_micro_batch``, the same for any batch it is given.
            batch: this rank's micro-batch.

        Returns:
            What ``work`` returns, or None where this rank ran out of memory. The ranks then have to agree: if
            any ran out, all ``discard``.

        Raises:
            DoesNotFit: not even two tokens go through.
        """

    @abstractmethod
    def discard(self) -> None:
        """Forget everything since the last ``step``: gradients, and random numbers that were drawn."""

    @abstractmethod
    def rest(self) -> None:
        """Nothing is asked of the backend for a while: give memory back, as far as the settings say. Whatever
        is called next takes it again."""

    @property
    @abstractmethod
    def offload_s(self) -> float:
        """Wall seconds so far that this rank spent on moving state to the host and back."""

    @abstractmethod
    def step(self) -> StepResult:
        """Clip, update the parameters at the scheduled rate, and clear the gradients.

        Raises:
            DoesNotFit: some rank ran out of memory, twice; raised on all ranks.
        """

    @abstractmethod
    def plan_buckets(self, *, bucket_bytes: int, wire_dtype: str | None) -> tuple[Bucket, ...]:
        """How the weights are published; ``wire_dtype`` casts floating-point tensors."""

    @abstractmethod
    def gather_bucket(self, bucket: Bucket) -> torch.Tensor | None:
        """The bucket's bytes as one contiguous uint8 tensor on rank 0's device; None on other ranks."""

    @abstractmethod
    def whole_weights(self, buckets: Sequence[Bucket]) -> Mapping[str, torch.Tensor]:
        """All weights by name on rank 0, written and at the same places each time; empty on other ranks.

        They may lie in another dtype than the buckets say. They stay as they are until the next ``step``.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write model, optimizer, counter and random state; every rank writes its share."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Read what ``save`` wrote, on any number of ranks."""

    @abstractmethod
    def export_hf(self, directory: Path) -> None:
        """Write a Hugging Face directory: config, safetensors, and the tokenizer's files."""
