"""A broadcast: whoever waits is woken by the next `fire`, once."""

from __future__ import annotations

import asyncio

Waiter = asyncio.Future[None]


class Signal:
    """Wakes all waiters at each change; a waiter looks at the state itself and waits again if need be."""

    def __init__(self) -> None:
        self._waiters: set[Waiter] = set()

    def fire(self) -> None:
        """Wakes everybody who waits now."""
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            wake(waiter)

    def waiter(self) -> Waiter:
        """A future that the next `fire` completes; take it before looking at the state."""
        waiter: Waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        waiter.add_done_callback(self._waiters.discard)
        return waiter

    async def wait(self, timeout_s: float) -> bool:
        """Waits for the next change; False when none came in time."""
        return await wait_for(self.waiter(), timeout_s)


async def wait_for(waiter: Waiter, timeout_s: float) -> bool:
    """Waits for one waiter; False when it was not woken in time."""
    try:
        async with asyncio.timeout(max(0.0, timeout_s)):
            await waiter
    except TimeoutError:
        return False
    return True


def wake(waiter: Waiter | None) -> None:
    """Wakes one waiter, if there is one and it still waits."""
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
