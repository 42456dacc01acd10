"""A step made ready to train: its groups checked, their sequences laid end to end and packed.

    fetched groups --prepare_step()--> PreparedStep --Learner.begin_step()--> tensors on the device

Runs on any thread, beside the step before: no collective, no device but for pinning. What only all ranks
together know, the totals that token weights are divided by, is left to ``begin_step``. A group that breaks
the contract is named and its sequences become empty ones, so that the plan still holds on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from milepost_trainer.batch import MicroBatch, SequenceBatch, TrainSequence
from milepost_trainer.objectives.base import LossAggregation, Objective, token_weights
from milepost_trainer.plan import GroupInfo, StepPlan


@dataclass(frozen=True)
class TrainGroup:
    """One group as the learner takes it.

    Attributes:
        rewards: float64 [G], NaN where there is none.
        sequences: the G samples, advantages not set yet.
    """

    rewards: NDArray[np.float64]
    sequences: tuple[TrainSequence, ...]


@dataclass(frozen=True)
class PreparedUpdate:
    """One rank's share of one optimizer update.

    Attributes:
        batch: its sequences.
        micro_batches: of them, on the host; their weights are not divided by the totals of all ranks.
    """

    batch: SequenceBatch
    micro_batches: tuple[MicroBatch, ...]


@dataclass(frozen=True)
class PreparedStep:
    """One rank's share of a step.

    Attributes:
        plan: of the step; the micro-batches are packed by it.
        updates: in order.
        refused: prompt_id -> what is wrong, for the groups of this rank that are left out.
    """

    plan: StepPlan
    updates: tuple[PreparedUpdate, ...]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class Preparer:
    """Prepares steps for one rank.

    Attributes:
        objective: gives the advantages.
        rank: whose share.
        loss_aggregation: how token losses become one.
        vocab_size: token ids at or above it are refused; None checks nothing.
        pin: lay tensors in pinned memory, for a device that copies from there without waiting.
    """

    objective: Objective
    rank: int = 0
    loss_aggregation: LossAggregation = "token"
    vocab_size: int | None = None
    pin: bool = False

    def prepare(self, plan: StepPlan, groups: Mapping[str, TrainGroup]) -> PreparedStep:
        """Check and pack this rank's groups.

        Args:
            plan: the step's.
            groups: prompt_id -> group, for ``plan.prompt_ids_of(rank)``. A missing one counts as broken.
        """
        refused: dict[str, str] = {}
        updates: list[PreparedUpdate] = []
        for index, update in enumerate(plan.updates):
            sequences: list[TrainSequence] = []
            for info in (plan.infos[position] for position in update.groups[self.rank]):
                made, problem = self._sequences(info, groups.get(info.prompt_id))
                sequences.extend(made)
                if problem:
                    refused[info.prompt_id] = problem
            batch = SequenceBatch.concatenate(sequences)
            updates.append(PreparedUpdate(batch, self.pack(plan, index, batch)))
        return PreparedStep(plan, tuple(updates), refused)

    def pack(self, plan: StepPlan, update: int, batch: SequenceBatch) -> tuple[MicroBatch, ...]:
        """The micro-batches of an update as the plan cuts them."""
        weights = token_weights(
            batch.predicted, aggregation=self.loss_aggregation, total_tokens=1, total_sequences=1
        )
        made = tuple(
            batch.micro_batch(indexes, token_weights=weights)
            for indexes in plan.updates[update].packing.ranks[self.rank]
        )
        return tuple(each.pinned() for each in made) if self.pin else made

    def _sequences(
        self, info: GroupInfo, group: TrainGroup | None
    ) -> tuple[Sequence[TrainSequence], str | None]:
        """A group's sequences with advantages; empty ones and a reason if it is broken."""
        problem = _problem(info, group, self.vocab_size)
        if group is None or problem is not None:
            return [_EMPTY] * len(info.num_tokens), problem
        advantages = self.objective.advantages(group.rewards)
        return [
            replace(sequence, advantage=float(advantage))
            for sequence, advantage in zip(group.sequences, advantages, strict=True)
        ], None


_EMPTY = TrainSequence(
    tokens=np.zeros(0, np.int32), loss_mask=np.zeros(0, np.uint8), logprobs=np.zeros(0, np.float32)
)


def _problem(info: GroupInfo, group: TrainGroup | None, vocab_size: int | None) -> str | None:
    """What is wrong with a group, in words; None for nothing."""
    if group is None:
        return "its payload cannot be read"
    if tuple(len(s.tokens) for s in group.sequences) != info.num_tokens:
        return f"its samples have other lengths than its header {info.num_tokens}"
    for index, sequence in enumerate(group.sequences):
        size = len(sequence.tokens)
        if len(sequence.loss_mask) != size or len(sequence.logprobs) != size:
            return f"sample {index}: tokens, loss_mask and logprobs differ in length"
        if size and sequence.loss_mask[0]:
            return f"sample {index}: loss_mask[0] is 1, but nothing precedes the first token"
        if size and (sequence.tokens.min() < 0 or (vocab_size and sequence.tokens.max() >= vocab_size)):
            return f"sample {index}: a token id lies outside of the vocabulary of {vocab_size}"
        if not np.isfinite(sequence.logprobs).all():
            return f"sample {index}: a log-prob is not finite"
    return None
