"""Every reply carries the run id of the Redis behind it: whoever acted on a fact learns that it restarted."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from milepost.channel import REDIS_RUN_ID_KEY

S = TypeVar("S")
Q = TypeVar("Q")
R = TypeVar("R")


def stamped(method: Callable[[S, Q], Awaitable[R]]) -> Callable[[S, Q, Any], Awaitable[R]]:
    """Makes a unary handler of a method of (self, request)."""

    @functools.wraps(method)
    async def handle(self: S, request: Q, context: Any) -> R:
        try:
            return await method(self, request)
        finally:
            _stamp(self, context)

    return handle


def stamped_stream(
    method: Callable[[S, Q], AsyncIterator[R]],
) -> Callable[[S, Q, Any], AsyncIterator[R]]:
    """Makes a streaming handler of a generator of (self, request)."""

    @functools.wraps(method)
    async def handle(self: S, request: Q, context: Any) -> AsyncIterator[R]:
        try:
            async for reply in method(self, request):
                yield reply
        finally:
            _stamp(self, context)

    return handle


def _stamp(servicer: Any, context: Any) -> None:
    context.set_trailing_metadata(((REDIS_RUN_ID_KEY, servicer.ledger.link.run_id),))


def seconds(request: Any, field: str) -> float | None:
    """A Duration field in seconds; None when unset."""
    return getattr(request, field).ToNanoseconds() / 1e9 if request.HasField(field) else None
