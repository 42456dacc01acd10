"""Cursors and options of the feeder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost.errors import FailedPrecondition, InvalidArgument
from milepost.feed import Cursor, FeedOptions


@given(st.integers(0, 10**9), st.integers(0, 10**12), st.integers(0, 10**15))
def test_a_cursor_reads_what_it_wrote(epoch: int, line: int, offset_bytes: int) -> None:
    cursor = Cursor(epoch, line, offset_bytes)
    assert Cursor.parse(str(cursor)) == cursor


def test_no_cursor_is_the_start() -> None:
    assert Cursor.parse("") == Cursor(0, 0, 0)


@pytest.mark.parametrize("text", ["7", "1/2", "1/2/3/4", "a/b/c", "1/-2/3", "//"])
def test_a_cursor_of_somebody_else_is_refused(text: str) -> None:
    with pytest.raises(FailedPrecondition, match="another source name"):
        Cursor.parse(text)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"batch": 0}, "batch = 0"), ({"batch": 1025}, "batch = 1025"), ({"epochs": 0}, "epochs = 0"),
     ({"epochs": 2, "follow": True}, "epochs = 2")],
)  # fmt: skip
def test_wrong_options_are_named(options: dict[str, int], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        FeedOptions(run_id="r", **options)  # type: ignore[arg-type]
