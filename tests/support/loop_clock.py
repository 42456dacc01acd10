"""The running event loop's clock, pushed forward: a deadline passes at once, and no sooner than a test wants.

A short deadline in a test ends too early on a machine that stands still for a moment; a long one that is
skipped ends exactly where the test says. For loops of asyncio's own (uvloop's clock cannot be set), and for
waits that go by `loop.time()`, as `asyncio.timeout`, `asyncio.sleep` and `loop.call_later` do. What keeps the
method itself must find it after the first call: `skip(0)` sees to that.
"""

from __future__ import annotations

import asyncio


def skip(seconds: float) -> None:
    """From now on it is that much later for the loop."""
    loop = asyncio.get_running_loop()
    if not hasattr(loop, "skipped_s"):
        own = loop.time
        loop.skipped_s = 0.0
        loop.time = lambda: own() + loop.skipped_s
    loop.skipped_s += seconds
