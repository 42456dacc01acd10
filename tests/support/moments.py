"""Moments that pass: a generation in its middle, a server that is away, a call that still waits.

Whoever looks may be held up for longer than the moment lasts. Then nothing was seen, and it is tried again;
what is asserted of a moment that was caught stays as strict as it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

T = TypeVar("T")


class Missed(Exception):
    """It was over before anybody looked."""


async def caught(what: str, attempt: Callable[[], Awaitable[T]], *, tries: int = 8) -> T:
    """Attempts until the moment is caught; an attempt that raises `Missed` has put everything back.

    Args:
      what: the moment, for the failure.
      attempt: brings it about and looks.
      tries: fail after so many.
    """
    for _ in range(tries):
        try:
            return await attempt()
        except Missed:
            continue
    pytest.fail(f"missed {tries} times: {what}")
