"""Spans of requests that pass through: only for those whose trace is recorded, and that never begin one.

The request goes on to its engine as a child of the router's span. Callers ask `tracing.on` first.
"""

from __future__ import annotations

from milepost.tracing import TRACEPARENT
from milepost_common.telemetry import tracing
from milepost_router.headers import Request
from milepost_router.passage import Passage
from milepost_router.upstream import RawHeaders

_NAME = TRACEPARENT.encode()


def begin(passage: Passage, headers: RawHeaders) -> None:
    """Gives the passage a span, if its client has one."""
    above = next((value for name, value in headers if name == _NAME), b"")
    request = passage.request
    span = tracing.span(
        "router.proxy",
        parent=above.decode("latin-1"),
        kind="server",
        run_id=request.ask.run_id,
        min_version=request.ask.min_version or None,
        path=passage.target.decode("latin-1"),
    )
    if span:
        below = request.passed.replace(_NAME + b": " + above, _NAME + b": " + span.traceparent.encode())
        passage.request = Request(request.ask, request.deadline_s, below)
        passage.span = span


def end(passage: Passage) -> None:
    """Ends it."""
    passage.span.set(outcome=passage.outcome)
    passage.span.end()
