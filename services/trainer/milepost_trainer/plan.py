"""The plan of a step: which groups each optimizer update takes, who trains them, in which micro-batches.

    leased groups, in order --cut--> groups of each update --dealt to ranks--> packed micro-batches

A pure function of the lease's metadata: every rank makes the same plan from what rank 0 broadcasts, and a
replayed step is planned as it was the first time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from milepost_trainer.packing import Bins, PackingPlan, assign_groups, pack_ranks


@dataclass(frozen=True)
class GroupInfo:
    """What planning needs to know of a group.

    Attributes:
        prompt_id: its name.
        num_tokens: tokens of each sample, in order.
    """

    prompt_id: str
    num_tokens: tuple[int, ...]


@dataclass(frozen=True)
class UpdatePlan:
    """One optimizer update.

    Attributes:
        groups: ``groups[r]`` the positions, in the step, of rank ``r``'s groups, ascending.
        packing: micro-batches of each rank, over the samples of its groups laid end to end.
    """

    groups: Bins
    packing: PackingPlan


@dataclass(frozen=True)
class StepPlan:
    """One step.

    Attributes:
        step: its number.
        infos: its groups, in lease order.
        updates: its optimizer updates; at least one.
        max_tokens: budget of a micro-batch that they were packed with.
    """

    step: int
    infos: tuple[GroupInfo, ...]
    updates: tuple[UpdatePlan, ...]
    max_tokens: int

    def prompt_ids_of(self, rank: int) -> tuple[str, ...]:
        """The groups that a rank fetches, in the order of its updates."""
        return tuple(
            self.infos[position].prompt_id for update in self.updates for position in update.groups[rank]
        )

    def sequences_of(self, update: int, rank: int) -> list[tuple[str, int, int]]:
        """(prompt id, sample, tokens) of what a rank trains in an update, as its packing counts them."""
        owned = (self.infos[position] for position in self.updates[update].groups[rank])
        return [(info.prompt_id, i, n) for info in owned for i, n in enumerate(info.num_tokens)]

    def with_budget(self, max_tokens: int) -> StepPlan:
        """The same updates and ranks, packed anew into micro-batches of at most so many tokens."""
        return replace(
            self,
            updates=tuple(_packed(self.infos, update.groups, max_tokens) for update in self.updates),
            max_tokens=max_tokens,
        )


def plan_step(
    step: int,
    infos: Sequence[GroupInfo],
    *,
    num_ranks: int,
    updates: int,
    max_tokens: int,
) -> StepPlan:
    """Plan a step.

    Args:
        step: its number.
        infos: its groups, in lease order; at least one.
        num_ranks: ranks that train.
        updates: optimizer updates wanted; fewer groups than that make fewer updates.
        max_tokens: budget of a micro-batch.

    Returns:
        The plan. Updates take contiguous shares of the groups, as even in number as can be.
    """
    if not infos:
        raise ValueError(f"step {step} has no groups: there is nothing to plan")
    count = min(updates, len(infos))
    bounds = [len(infos) * i // count for i in range(count + 1)]
    return StepPlan(
        step=step,
        infos=tuple(infos),
        updates=tuple(
            _plan_update(infos, range(low, high), num_ranks, max_tokens) for low, high in pairwise(bounds)
        ),
        max_tokens=max_tokens,
    )


def _plan_update(infos: Sequence[GroupInfo], positions: range, num_ranks: int, max_tokens: int) -> UpdatePlan:
    dealt = assign_groups([sum(infos[p].num_tokens) for p in positions], num_ranks=num_ranks)
    return _packed(infos, tuple(tuple(positions[i] for i in own) for own in dealt), max_tokens)


def _packed(infos: Sequence[GroupInfo], groups: Bins, max_tokens: int) -> UpdatePlan:
    lengths = [[n for p in own for n in infos[p].num_tokens] for own in groups]
    return UpdatePlan(groups=groups, packing=pack_ranks(lengths, max_tokens=max_tokens))
