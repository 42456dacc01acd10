"""The learner: one rank's part in training a step, from prepared groups to a moved model.

    prepare -> begin_step -> for each update: start_update -> train_micro_batch * n -> finish_update
                                                    ^                |
                                                    +-- some rank had no memory

Every rank drives its learner through the same calls in the same order, because most of them are collective;
rank 0 decides when. Between two calls the weights are whole and may be read out; they change only in
``finish_update``. Owned by one thread, but for ``prepare``, which any thread may call.

When some rank runs out of memory all of them learn of it in the same call, forget what the update has
gathered so far, and pack what is left of the step into micro-batches of half the size; the update is then
begun again. That size stays for later steps. Totals, weights and random numbers are as if all had gone well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from milepost_trainer.backends.base import Backend, MicroBatchResult
from milepost_trainer.batch import FloatArray, MicroBatch, SequenceBatch, TrainSequence
from milepost_trainer.memory import MemoryPeaks, PeakMeter, largest, over_ranks
from milepost_trainer.objectives.base import LossAggregation, Objective
from milepost_trainer.plan import StepPlan
from milepost_trainer.prepare import PreparedStep, PreparedUpdate, Preparer, TrainGroup
from milepost_trainer.profiler import StepProfiler
from milepost_trainer.settings import ProfileSettings
from milepost_trainer.shortage import Shortage, smaller_budget

__all__ = ["Learner", "TrainGroup", "UpdateReport"]


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
        oom_retries: how often something of it was begun again because a rank had no memory.
        max_tokens: budget of a micro-batch now.
        peaks: most memory that a rank held at once since the step began.
        offload_s: wall seconds of this rank, since the report before, for moving state to the host and back.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    num_tokens: int
    num_micro_batches: int
    means: Mapping[str, float] = field(default_factory=dict[str, float])
    oom_retries: int = 0
    max_tokens: int = 0
    peaks: MemoryPeaks = field(default_factory=MemoryPeaks)
    offload_s: float = 0.0


class Learner:
    """Trains one rank's share of each step."""

    def __init__(
        self,
        backend: Backend,
        objective: Objective,
        *,
        loss_aggregation: LossAggregation = "token",
        vocab_size: int | None = None,
        profiler: StepProfiler | None = None,
    ) -> None:
        """Bind a backend to an objective.

        Args:
            backend: holds the model; already loaded.
            objective: what to minimise.
            loss_aggregation: how token losses become one.
            vocab_size: token ids at or above it are refused; None checks nothing.
            profiler: looks at the steps of its window.
        """
        self.backend = backend
        self._profiler = profiler or StepProfiler(ProfileSettings(), rank=0, device=torch.device("cpu"))
        self._objective = objective
        self._preparer = Preparer(
            objective,
            rank=backend.world.rank,
            loss_aggregation=loss_aggregation,
            vocab_size=vocab_size,
            pin=backend.world.device.type == "cuda",
        )
        self._budget: int | None = None  # tokens of a micro-batch, once some rank ran out of memory
        self._shortages = 0  # since the last finished update
        self._step: PreparedStep | None = None
        self._scales: list[float] = []
        self._updates: list[list[MicroBatch]] = []
        self._update = 0
        self._results: list[MicroBatchResult] = []
        self._memory = PeakMeter(backend.world.device)
        self._offloaded_s = backend.offload_s

    def prepare(self, plan: StepPlan, groups: Mapping[str, TrainGroup]) -> PreparedStep:
        """See ``Preparer.prepare``; the learner's own state takes no part."""
        return self._preparer.prepare(plan, groups)

    def start_step(self, plan: StepPlan, groups: Mapping[str, TrainGroup]) -> dict[str, str]:
        """Prepare a step and begin it; see there."""
        return self.begin_step(self.prepare(plan, groups))

    def begin_step(self, step: PreparedStep) -> dict[str, str]:
        """Take up a step: put it on the device, and score it once if the objective compares with the step's
        first policy.

        Returns:
            prompt_id -> what is wrong, for the groups of this rank that are left out.
        """
        self._step, self._update = step, 0
        self._memory.reset()
        self._profiler.begin_step(step.plan.step)
        self._scales = [self._scale(update) for update in step.updates]
        self._updates = [list(each.micro_batches) for each in step.updates]
        if self._budget is not None and self._budget < step.plan.max_tokens:
            self._pack_anew(self._budget)
        else:
            self._updates = [self._on_device(i, each.micro_batches) for i, each in enumerate(step.updates)]
        if self._objective.needs_proximal and len(step.updates) > 1:
            while not self._score():
                pass
        return dict(step.refused)

    def start_update(self, index: int) -> int:
        """Take up the step's update ``index``, or take it up again; returns its number of micro-batches."""
        self._update = index
        self._results = []
        return len(self._updates[index])

    def train_micro_batch(self, index: int) -> Shortage | None:
        """Forward and backward of micro-batch ``index`` of the current update.

        Returns:
            None, or what was short, on all ranks alike: the update then has to be started again.

        Raises:
            SequenceDoesNotFit: on all ranks: one sequence alone is too much for one of them.
        """
        batches = self._updates[self._update]
        last = index == len(batches) - 1

        def train(batch: MicroBatch) -> MicroBatchResult:
            if self._objective.needs_reference:
                scored = self.backend.forward_logprobs(batch, reference=True)
                batch = replace(batch, reference_logprobs=scored)
            return self.backend.train_micro_batch(batch, self._objective, last=last)

        with self._profiler.part(f"micro_batch {index}"):
            result = self.backend.attempt(train, batches[index])
        if result is not None:
            self._results.append(result)
        return self._agree(None if result is not None else self._shortage(self._update, index))

    def finish_update(self) -> UpdateReport:
        """Move the parameters and add up what all ranks report."""
        with self._profiler.part("optimizer"):
            result = self.backend.step()
        if self._update == len(self._updates) - 1:
            self._profiler.end_step(self._plan.step)
        world = self.backend.world
        names = sorted({name for r in self._results for name in r.sums})
        mine = [
            *over_ranks(self._memory.read(), rank=world.rank, size=world.size),
            float(result.retries),
            sum(r.loss for r in self._results),
            float(sum(r.num_tokens for r in self._results)),
            *(sum(r.sums.get(name, 0.0) for r in self._results) for name in names),
        ]
        summed = world.sum(mine)
        peaks, (retries, loss, tokens, *sums) = summed[: 3 * world.size], summed[3 * world.size :]
        shortages, self._shortages = self._shortages, 0
        return UpdateReport(
            loss=loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            skipped=result.skipped,
            num_tokens=int(tokens),
            num_micro_batches=len(self._updates[self._update]),
            means={name: value / max(1.0, tokens) for name, value in zip(names, sums, strict=True)},
            oom_retries=shortages + int(retries),
            max_tokens=self._plan.max_tokens,
            peaks=largest(peaks),
            offload_s=self._offload_s(),
        )

    def _offload_s(self) -> float:
        before, self._offloaded_s = self._offloaded_s, self.backend.offload_s
        return self._offloaded_s - before

    def make_update(self, index: int) -> UpdateReport:
        """A whole update, begun again as often as memory is short."""
        while True:
            if all(self.train_micro_batch(i) is None for i in range(self.start_update(index))):
                return self.finish_update()

    def score(self, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
        """Log-probs (nats, at temperature 1) of an output after its prompt, by a pass of all ranks."""
        tokens = np.array([*prompt, *output], dtype=np.int32)
        mask = (np.arange(len(tokens)) >= len(prompt)).astype(np.uint8)
        blank = np.zeros(len(tokens), dtype=np.float32)
        sequences = SequenceBatch.concatenate([TrainSequence(tokens=tokens, loss_mask=mask, logprobs=blank)])
        batch = sequences.micro_batch(
            [0], token_weights=np.ones(1, dtype=np.float32), device=self.backend.world.device
        )
        return self.backend.forward_logprobs(batch).tolist()

    # ------------------------------------------------------------------ packing

    @property
    def _plan(self) -> StepPlan:
        assert self._step is not None, "begin_step comes first"
        return self._step.plan

    def _scale(self, update: PreparedUpdate) -> float:
        """What the weights of an update are multiplied by: one over the total of all ranks."""
        predicted = update.batch.predicted
        counts = [float(predicted.sum()), float((predicted > 0).sum())]
        tokens, sequences = self.backend.world.sum(counts)
        total = tokens if self._preparer.loss_aggregation == "token" else sequences
        return 1.0 / max(1.0, total)

    def _on_device(self, update: int, batches: tuple[MicroBatch, ...]) -> list[MicroBatch]:
        scale = self._scales[update]
        moved = (batch.to(self.backend.world.device) for batch in batches)
        return [replace(batch, weights=batch.weights * scale) for batch in moved]

    def _pack_anew(self, budget: int) -> None:
        """Pack what is not trained yet of the step into smaller micro-batches; scores go along."""
        assert self._step is not None
        plan = self._plan.with_budget(budget)
        updates = list(self._step.updates)
        for index in range(self._update, len(updates)):
            batch = replace(updates[index].batch, proximal=self._proximal(index))
            updates[index] = PreparedUpdate(batch, self._preparer.pack(plan, index, batch))
            self._updates[index] = self._on_device(index, updates[index].micro_batches)
        self._step = PreparedStep(plan, tuple(updates), self._step.refused)

    # ------------------------------------------------------------------ scores of the first policy

    def _score(self) -> bool:
        """Score every micro-batch of the step; False where memory was short and it has to be done again."""
        for update, batches in enumerate(self._updates):
            for index, batch in enumerate(batches):
                scored = self.backend.attempt(self.backend.forward_logprobs, batch)
                short = None if scored is not None else self._shortage(update, index)
                if self._agree(short) is not None:
                    return False
                batches[index] = replace(batch, proximal_logprobs=scored)
        return True

    def _proximal(self, update: int) -> FloatArray | None:
        """Scores of an update's tokens, where all its micro-batches have theirs."""
        assert self._step is not None
        batches = self._updates[update]
        if any(batch.proximal_logprobs is None for batch in batches):
            return None
        whole = self._step.updates[update].batch
        scores = np.zeros(whole.tokens.shape[0], np.float32)
        bins = self._plan.updates[update].packing.ranks[self.backend.world.rank]
        for indexes, batch in zip(bins, batches, strict=True):
            if batch.has_loss and batch.proximal_logprobs is not None:
                scores[whole.targets(indexes)] = batch.proximal_logprobs.cpu().numpy()
        return scores

    # ------------------------------------------------------------------ memory that is short

    def _shortage(self, update: int, index: int) -> Shortage:
        """What this rank had no memory for."""
        rank = self.backend.world.rank
        sequences = self._plan.sequences_of(update, rank)
        held = [sequences[i] for i in self._plan.updates[update].packing.ranks[rank][index]]
        prompt_id, sample, longest = max(held, key=lambda each: each[2], default=("", 0, 0))
        return Shortage(rank, sum(n for _, _, n in held), len(held), prompt_id, sample, longest)

    def _agree(self, mine: Shortage | None) -> Shortage | None:
        """Whether some rank ran out of memory; if so, every rank begins again with a smaller plan."""
        world = self.backend.world
        if not world.any_failed(mine is not None):
            return None
        shortages = [short for short in world.exchange(mine) if short is not None]
        self.backend.discard()
        self._budget = smaller_budget(shortages)
        self._shortages += 1
        self._pack_anew(self._budget)
        return max(shortages, key=lambda short: short.num_tokens)
