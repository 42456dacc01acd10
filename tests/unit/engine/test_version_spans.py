"""Spans of weight versions: contiguous, merged, covering."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from milepost_engine.generation import version_spans


def test_no_tokens_give_one_empty_span_of_the_present_version():
    assert version_spans([], "v1", 0) == [{"version": "v1", "start": 0, "end": 0}]


def test_a_version_that_drew_nothing_has_no_span():
    assert version_spans([("a", 4), ("b", 4)], "c", 6) == [
        {"version": "a", "start": 0, "end": 4},
        {"version": "c", "start": 4, "end": 6},
    ]


def test_a_change_after_the_last_token_leaves_no_trace():
    assert version_spans([("a", 4)], "b", 4) == [{"version": "a", "start": 0, "end": 4}]


@given(
    versions=st.lists(st.sampled_from("abc"), min_size=1, max_size=40),
)
def test_spans_tell_every_tokens_version(versions):
    """Built the way the engine marks: a mark whenever the version changes after at least one token."""
    marks, current = [], versions[0]
    for drawn, version in enumerate(versions):
        if version != current:
            marks.append((current, drawn))
            current = version
    spans = version_spans(marks, current, len(versions))
    told = [span["version"] for span in spans for _ in range(span["start"], span["end"])]
    assert told == versions
    assert spans[0]["start"] == 0
    for left, right in pairwise(spans):
        assert left["end"] == right["start"]
        assert left["version"] != right["version"]
