"""Spans in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from spans import Finished, recording


@pytest.fixture
def start_tracing() -> Iterator[Callable[[float], Finished]]:
    """Turns tracing on with a ratio; what it returns tells the spans that have ended."""
    with ExitStack() as stack:
        yield lambda ratio: stack.enter_context(recording(ratio))


@pytest.fixture
def finished() -> Iterator[Finished]:
    """Tracing is on, and every trace is recorded."""
    with recording() as told:
        yield told
