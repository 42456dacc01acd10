"""The running event loop's clock, pushed forward: a deadline passes at once, and no sooner than a test wants.

A short deadline in a test ends too early on a machine that stands still for a moment; a long one that is
skipped ends exactly where the test says. For loops of asyncio's own (uvloop's clock cannot be set), and for
waits that go by `loop.time()`, as `asyncio.timeout`, `asyncio.sleep` and `loop.call_later` do.
"""

from __future__ import annotations

import asyncio


def skip(seconds: float) -> None:
    """From now on it is that much later for the loop."""
    loop = asyncio.get_running_loop()
    before = loop.time
    loop.time = lambda: before() + seconds
