"""Batches: what the trainer holds of a step, first as flat numpy arrays, then as packed tensors.

    payloads --SequenceBatch.concatenate--> flat arrays of one rank --micro_batch(indexes)--> packed tensors

Shape legend, used in all names of the trainer's core:
  S sequences, N tokens of a batch, T tokens fed in a micro-batch, M predicted (masked-in) tokens of it.

Everything after the model speaks in [M]: only tokens with loss mask 1 reach the LM head, and of a sequence
only the tokens before its last predicted one reach the model at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from milepost_trainer.layout import PackedLayout

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True)
class TrainSequence:
    """One trainable sequence as it came from the buffer.

    Attributes:
        tokens: int32 [n] token ids, prompt and response.
        loss_mask: uint8 [n], 1 where the model produced the token.
        logprobs: float32 [n] log-probabilities of the engine in nats, 0 where the mask is 0.
        temperature: the sampling temperature, 0 for greedy (log-probs are then those of temperature 1).
        advantage: advantage of every predicted token of the sequence.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    logprobs: NDArray[np.float32]
    temperature: float = 1.0
    advantage: float = 0.0


@dataclass(frozen=True)
class MicroBatch:
    """Packed tensors of one forward and backward pass, all on the backend's device.

    Attributes:
        input_ids: int64 [1, T] sequences laid end to end.
        position_ids: int64 [1, T] positions, restarting at 0 with each sequence.
        layout: where the sequences start; attention needs it.
        source: int64 [M] index into T of the position that predicts.
        target: int64 [M] token predicted.
        temperature: float32 [M], or None when all are 1.
        old_logprobs: float32 [M] log-probs under the policy that sampled, in nats.
        advantages: float32 [M].
        weights: float32 [M]; the loss is ``sum(weights * token_loss)``.
        reference_logprobs: float32 [M] under the reference model, or None.
        proximal_logprobs: float32 [M] under the policy at the start of the step, or None.
        has_loss: False for the dummy that an idle rank runs.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: PackedLayout
    source: torch.Tensor
    target: torch.Tensor
    temperature: torch.Tensor | None
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    reference_logprobs: torch.Tensor | None = None
    proximal_logprobs: torch.Tensor | None = None
    has_loss: bool = True

    @property
    def num_predicted(self) -> int:
        """M, the tokens that carry loss."""
        return int(self.target.numel())

    @property
    def num_fed(self) -> int:
        """T, the tokens that go through the model."""
        return int(self.input_ids.shape[1])

    def predicted(self, cut: slice) -> MicroBatch:
        """The same with a part of its predicted tokens."""

        def part(tensor: torch.Tensor | None) -> Any:
            return None if tensor is None else tensor[cut]

        return replace(
            self,
            source=self.source[cut],
            target=self.target[cut],
            temperature=part(self.temperature),
            old_logprobs=self.old_logprobs[cut],
            advantages=self.advantages[cut],
            weights=self.weights[cut],
            reference_logprobs=part(self.reference_logprobs),
            proximal_logprobs=part(self.proximal_logprobs),
        )

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device; from pinned memory the copies do not wait."""
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The same in pinned memory of the host."""
        return _each_tensor(self, lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class SequenceBatch:
    """The sequences of one rank for one optimizer update, as flat arrays.

    Attributes:
        tokens: int32 [N].
        loss_mask: bool [N].
        logprobs: float32 [N].
        starts: int64 [S] offset of each sequence.
        lengths: int64 [S] tokens of each sequence.
        fed: int64 [S] tokens of it that the model must see.
        predicted: int64 [S] tokens with loss.
        temperatures: float32 [S], 1 where sampling was greedy.
        advantages: float32 [S].
        proximal: float32 [N] log-probs under the policy at the start of the step, 0 where nothing is
            predicted; None where they are not known.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    logprobs: FloatArray
    starts: IntArray
    lengths: IntArray
    fed: IntArray
    predicted: IntArray
    temperatures: FloatArray
    advantages: FloatArray
    proximal: FloatArray | None = None
    _uniform: bool = field(default=True, repr=False)

    @classmethod
    def concatenate(cls, sequences: Sequence[TrainSequence]) -> SequenceBatch:
        """Lay sequences end to end.

        Raises:
            ValueError: arrays of one sequence differ in length, or its first token carries loss.
        """
        for index, item in enumerate(sequences):
            _check(index, item)
        lengths = np.array([item.tokens.shape[0] for item in sequences], dtype=np.int64)
        starts = _starts(lengths)
        mask = _join([item.loss_mask for item in sequences], np.uint8).astype(np.bool_)
        total = int(lengths.sum())
        # Position of the last predicted token of each sequence = how many tokens must be fed to predict it.
        marked = np.where(mask, np.arange(total, dtype=np.int64) - np.repeat(starts, lengths), 0)
        busy = lengths > 0
        fed = np.zeros(len(sequences), dtype=np.int64)
        predicted = np.zeros(len(sequences), dtype=np.int64)
        if busy.any():
            fed[busy] = np.maximum.reduceat(marked, starts[busy])
            predicted[busy] = np.add.reduceat(mask.astype(np.int64), starts[busy])
        temperatures = np.array([item.temperature or 1.0 for item in sequences], dtype=np.float32)
        return cls(
            tokens=_join([item.tokens for item in sequences], np.int32),
            loss_mask=mask,
            logprobs=_join([item.logprobs for item in sequences], np.float32),
            starts=starts,
            lengths=lengths,
            fed=fed,
            predicted=predicted,
            temperatures=temperatures,
            advantages=np.array([item.advantage for item in sequences], dtype=np.float32),
            _uniform=bool((temperatures == 1.0).all()),
        )

    @property
    def num_sequences(self) -> int:
        """S."""
        return int(self.lengths.shape[0])

    def targets(self, indexes: Sequence[int]) -> IntArray:
        """int64 [M]: where the predicted tokens of ``micro_batch(indexes)`` stand among the N tokens."""
        chosen = self._chosen(indexes)
        fed_after_first = _ranges(self.starts[chosen] + 1, self.fed[chosen])
        return fed_after_first[self.loss_mask[fed_after_first]]

    def _chosen(self, indexes: Sequence[int]) -> IntArray:
        return np.array([i for i in indexes if self.fed[i] > 0], dtype=np.int64)

    def micro_batch(
        self, indexes: Sequence[int], *, token_weights: FloatArray, device: torch.device | None = None
    ) -> MicroBatch:
        """Pack some sequences into tensors.

        Args:
            indexes: which sequences, in the order they are laid out. None at all gives a dummy without
                loss, so that every rank still runs the same collectives.
            token_weights: float32 [S] weight of each predicted token of a sequence.
            device: where the tensors go.

        Returns:
            The packed micro-batch.
        """
        chosen = self._chosen(indexes)
        if chosen.size == 0:
            return dummy_batch(device)
        fed = self.fed[chosen]
        feed_at = _ranges(self.starts[chosen], fed)
        packed_starts = _starts(fed)
        positions = np.arange(feed_at.shape[0], dtype=np.int64) - np.repeat(packed_starts, fed)
        # Feeding position i predicts token i + 1: it is a source when that next token carries loss.
        source = np.flatnonzero(self.loss_mask[feed_at + 1])
        target_at = feed_at[source] + 1
        owner = np.repeat(chosen, self.predicted[chosen])

        def tensor(array: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

        return MicroBatch(
            input_ids=tensor(self.tokens[feed_at], torch.int64)[None],
            position_ids=tensor(positions, torch.int64)[None],
            layout=PackedLayout.from_lengths(fed.tolist(), device=device),
            source=tensor(source, torch.int64),
            target=tensor(self.tokens[target_at], torch.int64),
            temperature=None if self._uniform else tensor(self.temperatures[owner], torch.float32),
            old_logprobs=tensor(self.logprobs[target_at], torch.float32),
            advantages=tensor(self.advantages[owner], torch.float32),
            weights=tensor(token_weights[owner], torch.float32),
            proximal_logprobs=None
            if self.proximal is None
            else tensor(self.proximal[target_at], torch.float32),
        )


def _each_tensor(value: T, change: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """A copy of a frozen dataclass with all tensors in it changed, those in its fields' own fields too."""

    def changed(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return change(item)
        if isinstance(item, tuple):
            return tuple(changed(each) for each in cast(tuple[Any, ...], item))
        return _each_tensor(item, change) if is_dataclass(item) else item

    made: Any = value
    given = [each.name for each in fields(made) if each.init]
    return replace(made, **{name: changed(getattr(made, name)) for name in given})


def _check(index: int, item: TrainSequence) -> None:
    size = item.tokens.shape[0]
    for name, array in (("loss_mask", item.loss_mask), ("logprobs", item.logprobs)):
        if array.shape[0] != size:
            raise ValueError(
                f"sequence {index}: {name} has {array.shape[0]} entries and tokens {size}; "
                "give one for each token"
            )
    if size and item.loss_mask[0]:
        raise ValueError(
            f"sequence {index}: loss_mask[0] is 1, but nothing precedes the first token; mask it out"
        )


def _join(arrays: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    if not arrays:
        return np.zeros(0, dtype=dtype)
    return np.concatenate(arrays).astype(dtype, copy=False)


def _starts(lengths: IntArray) -> IntArray:
    return np.cumsum(lengths) - lengths


def _ranges(starts: IntArray, lengths: IntArray) -> IntArray:
    """Concatenate ``arange(start, start + length)`` for all pairs."""
    return np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(starts - _starts(lengths), lengths)


def dummy_batch(device: torch.device | None) -> MicroBatch:
    """Two tokens through the model and a zero-weight prediction: parameters get zero gradients.

    Not one token: a compiled layer, made for any number, is compiled anew for a single one.
    """
    one = torch.zeros(1, dtype=torch.int64, device=device)
    two = torch.arange(2, device=device)
    nothing = torch.zeros(1, dtype=torch.float32, device=device)
    return MicroBatch(
        input_ids=torch.zeros_like(two)[None],
        position_ids=two[None],
        layout=PackedLayout.from_lengths([2], device=device),
        source=one,
        target=one,
        temperature=None,
        old_logprobs=nothing,
        advantages=nothing,
        weights=nothing,
        has_loss=False,
    )
