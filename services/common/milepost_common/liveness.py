"""Does a process still answer? Three looks in a row that find nobody say no.

    look ok ──> pause ──> look ...          one slice = timeout_s / 3, the deadline of a look too
      └ failed ──> rest of its slice ──> look ──failed──> ... the third in a row: gone

Looks are counted rather than seconds since the last answer: a watcher that was itself stopped, or a machine
that slept, sees its clock jump and at most one look fail. Whoever calls owns what follows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from milepost.errors import MilepostError

LOOKS = 3
_LONGEST_PAUSE_S = 5.0

Look = Callable[[float], Awaitable[None]]
"""Asks once, with a deadline in seconds; raises where nobody answers well."""


async def until_silent(look: Look, *, timeout_s: float) -> str:
    """Looks until nobody has answered for `timeout_s`.

    Args:
      look: asks once; raises MilepostError, OSError or TimeoutError.
      timeout_s: above 0.

    Returns:
      What the last look said.
    """
    slice_s = timeout_s / LOOKS
    failures = 0
    while True:
        started = time.monotonic()
        try:
            async with asyncio.timeout(slice_s):
                await look(slice_s)
        except (MilepostError, OSError) as error:  # TimeoutError is an OSError
            failures += 1
            if failures >= LOOKS:
                return str(error) or f"no answer within {slice_s:g} s"
            await asyncio.sleep(max(0.0, slice_s - (time.monotonic() - started)))
        else:
            failures = 0
            await asyncio.sleep(min(slice_s, _LONGEST_PAUSE_S))
