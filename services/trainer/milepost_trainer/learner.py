"""The learner: one rank's part in training a step, from fetched groups to a moved model.

    start_step(plan, groups) -> for each update: start_update -> train_micro_batch * n -> finish_update

Every rank drives its learner through the same calls in the same order, because most of them are collective;
rank 0 decides when. Between two calls the weights are whole and may be read out; they change only in
``finish_update``. Owned by one thread. A group that breaks the contract is left out and named, it never stops
the step: its sequences become empty ones, so that the plan still holds on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from milepost_trainer.backends.base import Backend, MicroBatchResult
from milepost_trainer.batch import MicroBatch, SequenceBatch, TrainSequence
from milepost_trainer.objectives.base import LossAggregation, Objective, token_weights
from milepost_trainer.plan import GroupInfo, StepPlan, UpdatePlan


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
class UpdateReport:
    """One optimizer update, over all ranks.

    Attributes:
        loss: the global loss.
        grad_norm: before clipping.
        learning_rate: that was used.
        skipped: the norm was not finite.
        num_tokens: predicted tokens of all ranks.
        num_micro_batches: per rank.
        means: name -> mean over the predicted tokens.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    num_tokens: int
    num_micro_batches: int
    means: Mapping[str, float] = field(default_factory=dict[str, float])


class Learner:
    """Trains one rank's share of each step."""

    def __init__(
        self,
        backend: Backend,
        objective: Objective,
        *,
        loss_aggregation: LossAggregation = "token",
        vocab_size: int | None = None,
    ) -> None:
        """Bind a backend to an objective.

        Args:
            backend: holds the model; already loaded.
            objective: what to minimise.
            loss_aggregation: how token losses become one.
            vocab_size: token ids at or above it are refused; None checks nothing.
        """
        self.backend = backend
        self._objective = objective
        self._aggregation: LossAggregation = loss_aggregation
        self._vocab_size = vocab_size
        self._updates: list[list[MicroBatch]] = []
        self._current: list[MicroBatch] = []
        self._results: list[MicroBatchResult] = []

    def start_step(self, plan: StepPlan, groups: Mapping[str, TrainGroup]) -> dict[str, str]:
        """Pack this rank's groups, and score them once if the objective compares with the step's first
        policy.

        Args:
            plan: the step's.
            groups: prompt_id -> group, for ``plan.prompt_ids_of(rank)``. A missing one counts as broken.

        Returns:
            prompt_id -> what is wrong, for the groups of this rank that are left out.
        """
        refused: dict[str, str] = {}
        rank = self.backend.world.rank
        self._updates = []
        for update in plan.updates:
            infos = [plan.infos[position] for position in update.groups[rank]]
            sequences: list[TrainSequence] = []
            for info in infos:
                made, problem = self._sequences(info, groups.get(info.prompt_id))
                sequences.extend(made)
                if problem:
                    refused[info.prompt_id] = problem
            self._updates.append(self._pack(update, SequenceBatch.concatenate(sequences)))
        if self._objective.needs_proximal and len(plan.updates) > 1:
            self._updates = [[self._with_proximal(b) for b in batches] for batches in self._updates]
        return refused

    def start_update(self, index: int) -> int:
        """Take up the step's update ``index``; returns its number of micro-batches."""
        self._current = self._updates[index]
        self._results = []
        return len(self._current)

    def train_micro_batch(self, index: int) -> None:
        """Forward and backward of micro-batch ``index`` of the current update."""
        batch = self._current[index]
        if self._objective.needs_reference:
            scored = self.backend.forward_logprobs(batch, reference=True)
            batch = replace(batch, reference_logprobs=scored)
        last = index == len(self._current) - 1
        self._results.append(self.backend.train_micro_batch(batch, self._objective, last=last))

    def finish_update(self) -> UpdateReport:
        """Move the parameters and add up what all ranks report."""
        result = self.backend.step()
        names = sorted({name for r in self._results for name in r.sums})
        mine = [
            sum(r.loss for r in self._results),
            float(sum(r.num_tokens for r in self._results)),
            *(sum(r.sums.get(name, 0.0) for r in self._results) for name in names),
        ]
        loss, tokens, *sums = self.backend.world.sum(mine)
        return UpdateReport(
            loss=loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            skipped=result.skipped,
            num_tokens=int(tokens),
            num_micro_batches=len(self._current),
            means={name: value / max(1.0, tokens) for name, value in zip(names, sums, strict=True)},
        )

    # ------------------------------------------------------------------ packing

    def _sequences(
        self, info: GroupInfo, group: TrainGroup | None
    ) -> tuple[Sequence[TrainSequence], str | None]:
        """A group's sequences with advantages; empty ones and a reason if it is broken."""
        problem = _problem(info, group, self._vocab_size)
        if group is None or problem is not None:
            return [_EMPTY] * len(info.num_tokens), problem
        advantages = self._objective.advantages(group.rewards)
        return [
            replace(sequence, advantage=float(advantage))
            for sequence, advantage in zip(group.sequences, advantages, strict=True)
        ], None

    def _pack(self, update: UpdatePlan, batch: SequenceBatch) -> list[MicroBatch]:
        world = self.backend.world
        trained = int((batch.predicted > 0).sum())
        total_tokens, total_sequences = world.sum([float(batch.predicted.sum()), float(trained)])
        weights = token_weights(
            batch.predicted,
            aggregation=self._aggregation,
            total_tokens=int(total_tokens),
            total_sequences=int(total_sequences),
        )
        return [
            batch.micro_batch(indexes, token_weights=weights, device=world.device)
            for indexes in update.packing.ranks[world.rank]
        ]

    def _with_proximal(self, batch: MicroBatch) -> MicroBatch:
        return replace(batch, proximal_logprobs=self.backend.forward_logprobs(batch))


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
