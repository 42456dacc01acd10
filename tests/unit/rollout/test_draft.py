"""Samples in the making: masks by construction, partial replies joined."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milepost.types import Outcome, VersionSpan
from milepost_rollout.draft import Draft
from milepost_rollout.replies import Generation

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def generation(ids: list[int], *spans: tuple[int, int, int], exact: bool = True) -> Generation:
    return Generation(
        output_ids=np.array(ids, np.int32),
        logprobs=-np.array(ids, np.float32),
        spans=tuple(VersionSpan(start=s, end=e, weight_version=v) for s, e, v in spans),
        exact=exact,
        finish="stop",
        engine_id="e1",
    )


def prompt(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def test_prompt_and_model():
    draft = Draft(prompt(9, 8))
    draft.add_model(generation([1, 2, 3], (0, 1, 4), (1, 3, 5)))
    sample = draft.finish(index=3, outcome=Outcome.COMPLETED, text="abc")
    assert sample.tokens.tolist() == [9, 8, 1, 2, 3]
    assert sample.loss_mask.tolist() == [0, 0, 1, 1, 1]
    assert sample.logprobs.tolist() == [0, 0, -1, -2, -3]
    assert (sample.tokens.dtype, sample.loss_mask.dtype, sample.logprobs.dtype) == (
        np.int32,
        np.uint8,
        np.float32,
    )
    assert sample.prompt_length == 2
    assert sample.version_spans == (
        VersionSpan(start=2, end=3, weight_version=4),
        VersionSpan(start=3, end=5, weight_version=5),
    )
    assert sample.version_spans_exact
    assert (sample.index, sample.text, sample.engine_id) == (3, "abc", "e1")


def test_partial_replies_are_joined_and_equal_versions_merge():
    draft = Draft(prompt(9))
    draft.add_model(generation([1, 2], (0, 2, 4)))
    draft.add_model(generation([3], (0, 1, 4)))
    draft.add_model(generation([4], (0, 1, 5), exact=False))
    sample = draft.finish(index=0, outcome=Outcome.TRUNCATED)
    assert sample.tokens.tolist() == [9, 1, 2, 3, 4]
    assert sample.version_spans == (
        VersionSpan(start=1, end=4, weight_version=4),
        VersionSpan(start=4, end=5, weight_version=5),
    )
    assert not sample.version_spans_exact
    assert draft.generated == 4


def test_environment_tokens_are_not_trained_on_and_split_spans():
    draft = Draft(prompt(9))
    draft.add_model(generation([1], (0, 1, 4)))
    draft.add_environment(prompt(7, 7))
    draft.add_model(generation([2], (0, 1, 4)))
    sample = draft.finish(index=0, outcome=Outcome.COMPLETED)
    assert sample.loss_mask.tolist() == [0, 1, 0, 0, 1]
    assert sample.logprobs.tolist() == [0, -1, 0, 0, -2]
    assert [(s.start, s.end) for s in sample.version_spans] == [(1, 2), (4, 5)]


def test_an_error_outcome_trains_on_nothing():
    draft = Draft(prompt(9))
    draft.add_model(generation([1, 2], (0, 2, 4)))
    sample = draft.finish(index=0, outcome=Outcome.ENGINE_ERROR, error="it broke")
    assert sample.loss_mask.tolist() == [0, 0, 0]
    assert sample.logprobs.tolist() == [0, 0, 0]
    assert sample.tokens.tolist() == [9, 1, 2]
    assert sample.error == "it broke"


def test_rewinding_forgets_what_came_after_the_mark():
    draft = Draft(prompt(9))
    draft.add_model(generation([1], (0, 1, 4)))
    mark = draft.mark()
    draft.add_model(generation([2, 3], (0, 2, 4), exact=False))
    draft.rewind(mark)
    assert draft.tokens.tolist() == [9, 1]
    assert (draft.generated, draft.length, draft.versions) == (1, 2, {4})
    assert draft.finish(index=0, outcome=Outcome.COMPLETED).version_spans_exact


pieces = st.lists(
    st.tuples(st.booleans(), st.lists(st.integers(1, 99), max_size=4), st.integers(1, 3)), max_size=6
)


@relaxed
@given(st.lists(st.integers(1, 99), min_size=1, max_size=4), pieces)
def test_spans_cover_exactly_what_is_trained_on(start: list[int], parts: list[tuple[bool, list[int], int]]):
    draft = Draft(np.array(start, np.int32))
    expected = list(start)
    for by_model, ids, version in parts:
        expected += ids
        if by_model:
            draft.add_model(generation(ids, *([(0, len(ids), version)] if ids else [])))
        else:
            draft.add_environment(np.array(ids, np.int32))
    sample = draft.finish(index=0, outcome=Outcome.COMPLETED)
    assert sample.tokens.tolist() == expected
    covered = np.zeros(len(expected), np.uint8)
    for span in sample.version_spans:
        assert not covered[span.start : span.end].any()
        covered[span.start : span.end] = 1
    assert np.array_equal(covered, sample.loss_mask)
    assert np.array_equal(sample.logprobs != 0, sample.loss_mask == 1)
