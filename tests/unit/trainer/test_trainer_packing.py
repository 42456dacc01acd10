"""The packing plan: every invariant of its module, for any input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost_trainer.packing import assign_groups, pack_ranks

_LENGTHS = st.lists(st.integers(0, 300), max_size=60)


@given(st.lists(_LENGTHS, min_size=1, max_size=4), st.integers(1, 500))
def test_every_sequence_once_equal_counts_within_budget(lengths: list[list[int]], max_tokens: int) -> None:
    plan = pack_ranks(lengths, max_tokens=max_tokens)
    assert len(plan.ranks) == len(lengths)
    for own, bins in zip(lengths, plan.ranks, strict=True):
        assert len(bins) == plan.num_micro_batches >= 1
        assert sorted(i for items in bins for i in items) == list(range(len(own)))
        for items in bins:
            assert len(items) == 1 or sum(own[i] for i in items) <= max_tokens


@given(st.lists(_LENGTHS, min_size=1, max_size=3), st.integers(1, 500))
def test_plan_is_a_function_of_its_input(lengths: list[list[int]], max_tokens: int) -> None:
    copy = [list(own) for own in lengths]
    assert pack_ranks(lengths, max_tokens=max_tokens) == pack_ranks(copy, max_tokens=max_tokens)


@given(_LENGTHS, st.integers(1, 6))
def test_groups_are_dealt_once_and_evenly(tokens: list[int], num_ranks: int) -> None:
    ranks = assign_groups(tokens, num_ranks=num_ranks)
    assert sorted(i for items in ranks for i in items) == list(range(len(tokens)))
    loads = [sum(tokens[i] for i in items) for items in ranks]
    # Longest-first dealing never leaves two ranks further apart than the longest item.
    assert max(loads) - min(loads) <= max(tokens, default=0)


def test_as_few_micro_batches_as_fit() -> None:
    plan = pack_ranks([[6, 4, 5, 5, 7, 3]], max_tokens=10)
    assert plan.num_micro_batches == 3


def test_a_rank_without_sequences_gets_empty_micro_batches() -> None:
    plan = pack_ranks([[10, 10], []], max_tokens=10)
    assert plan.ranks[1] == ((), ())


def test_a_sequence_above_the_budget_stands_alone() -> None:
    plan = pack_ranks([[50, 2, 2]], max_tokens=10)
    assert (0,) in plan.ranks[0]
    assert plan.num_micro_batches == 2


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch is 0"):
        pack_ranks([[1]], max_tokens=0)
    with pytest.raises(ValueError, match="lengths_by_rank is empty"):
        pack_ranks([], max_tokens=1)
    with pytest.raises(ValueError, match="num_ranks is 0"):
        assign_groups([1], num_ranks=0)
