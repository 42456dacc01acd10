"""Version strings, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost_router import version_string
from milepost_router.version_string import LoadedVersion

RUNS = st.from_regex(r"[A-Za-z0-9._-]{1,128}", fullmatch=True).filter(lambda r: r != "updating")


@given(RUNS, st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_string_is_read_as_it_was_written(run_id, version, label):
    loaded = LoadedVersion(run_id, version, label)
    assert version_string.parse(str(loaded)) == loaded


@given(st.text())
def test_any_text_is_read_or_refused_quietly(text):
    loaded = version_string.parse(text)
    assert loaded is None or loaded.version >= 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "default",
        "run",
        "run/1",
        "run/0/0",
        "/1/1",
        "run/1/",
        "run/x/1",
        "run/1/2/3",
        "run/-1/0",
        "run/１/0",
    ],
)
def test_what_names_no_weights(text):
    assert version_string.parse(text) is None


def test_a_mark_is_never_taken_for_weights():
    assert version_string.updating("run/5/3/1") == "updating/run/5/3/1"
    assert version_string.parse("updating/3/1") is None
