"""Packing: which rank trains which group, and which sequences share a micro-batch. Pure functions.

    group tokens --assign_groups--> groups of each rank --pack_ranks--> micro-batches of each rank

Invariants, each a property test:
  * every sequence stands in exactly one micro-batch of the rank that owns it;
  * every rank has the same number of micro-batches (collectives pair up), padded with empty ones;
  * a micro-batch holds at most ``max_tokens`` tokens, unless it is one sequence longer than that;
  * equal input gives equal output, on every rank and in every replay.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

Bins = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class PackingPlan:
    """Micro-batches of every rank.

    Attributes:
        ranks: ``ranks[r][m]`` holds the indexes, into rank ``r``'s own list of sequences, of micro-batch
            ``m``.
    """

    ranks: tuple[Bins, ...]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per rank, the same for all."""
        return len(self.ranks[0])


def assign_groups(group_tokens: Sequence[int], *, num_ranks: int) -> Bins:
    """Deal whole groups to ranks so that their token counts come out even (longest first to the lightest).

    Args:
        group_tokens: tokens of each group, in lease order.
        num_ranks: how many ranks share them.

    Returns:
        For each rank the ascending positions of its groups. A rank may get none.

    Raises:
        ValueError: ``num_ranks`` is below 1.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}: it must be at least 1")
    return _deal(_longest_first(group_tokens), group_tokens, num_ranks)


def pack_ranks(lengths_by_rank: Sequence[Sequence[int]], *, max_tokens: int) -> PackingPlan:
    """Pack each rank's sequences into as few micro-batches as fit, then even out their tokens.

    Args:
        lengths_by_rank: ``lengths_by_rank[r][i]`` tokens of sequence ``i`` of rank ``r``.
        max_tokens: budget of one micro-batch, in tokens.

    Returns:
        The plan: at least one micro-batch (maybe empty) and the same number for every rank.

    Raises:
        ValueError: there is no rank, or the budget is below 1.
    """
    if not lengths_by_rank:
        raise ValueError("lengths_by_rank is empty: name at least one rank")
    if max_tokens < 1:
        raise ValueError(f"max_tokens_per_micro_batch is {max_tokens}: it must be at least 1")
    fitted = [_fit(lengths, max_tokens) for lengths in lengths_by_rank]
    count = max(1, *(len(bins) for bins in fitted))
    return PackingPlan(
        tuple(
            _even_out(lengths, bins, count, max_tokens)
            for lengths, bins in zip(lengths_by_rank, fitted, strict=True)
        )
    )


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _deal(order: Sequence[int], lengths: Sequence[int], count: int) -> Bins:
    """Give each item in turn to the bin with the fewest tokens; ties go to the lower bin."""
    heap = [(0, index) for index in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for item in order:
        load, index = heap[0]
        bins[index].append(item)
        heapq.heapreplace(heap, (load + lengths[item], index))
    return tuple(tuple(sorted(items)) for items in bins)


def _fit(lengths: Sequence[int], max_tokens: int) -> Bins:
    """Best fit, longest first: few bins, none above the budget unless one sequence alone is."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens still free, bin), ascending
    for item in _longest_first(lengths):
        size = lengths[item]
        slot = bisect_left(rooms, (size, -1))
        if slot == len(rooms):
            bins.append([item])
            insort(rooms, (max_tokens - size, len(bins) - 1))
            continue
        room, index = rooms.pop(slot)
        bins[index].append(item)
        insort(rooms, (room - size, index))
    return tuple(tuple(sorted(items)) for items in bins)


def _even_out(lengths: Sequence[int], fitted: Bins, count: int, max_tokens: int) -> Bins:
    """Deal into ``count`` bins; keep the fitted ones where dealing would break the budget."""
    dealt = _deal(_longest_first(lengths), lengths, count)
    fits = all(len(items) <= 1 or sum(lengths[i] for i in items) <= max_tokens for items in dealt)
    return dealt if fits else fitted + ((),) * (count - len(fitted))
