"""The trace context of a client, where there is one: W3C `traceparent` out of whatever span is active.

OpenTelemetry is no dependency of the clients. Where nobody in the process has imported it, no span can be
active, and all that happens here is one look-up in `sys.modules`. Where an application has, its active span
travels with every call of Milepost's clients in gRPC metadata, and inside the prompts that they put.

    with tracer.start_as_current_span("nightly"):
        await buffer.put_prompts(...)          # the prompts belong to that trace

`begin` makes the span of one prompt that a feeder puts. Its provider is the application's global one, or the
one given to `use_provider`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

TRACEPARENT = "traceparent"
_API = "opentelemetry.trace"
_SCOPE = "milepost"

_provider: Any = None


def use_provider(provider: Any) -> Any:
    """Makes spans of the client with this provider, None: with the global one; returns the one before."""
    global _provider
    before, _provider = _provider, provider
    return before


def active() -> str:
    """`traceparent` of the active span; empty without one."""
    api = sys.modules.get(_API)
    return "" if api is None else traceparent_of(api.get_current_span().get_span_context())


def metadata() -> tuple[tuple[str, str], ...] | None:
    """gRPC metadata that hands the active span on; None without one."""
    value = active()
    return ((TRACEPARENT, value),) if value else None


def mark(prompts: Iterable[Any], traceparent: str) -> None:
    """Writes a trace context into those messages of prompts that have none."""
    if traceparent:
        for prompt in prompts:
            prompt.traceparent = prompt.traceparent or traceparent


def traceparent_of(context: Any) -> str:
    """A span context as W3C writes it; empty for an invalid one."""
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


class PromptSpan:
    """The first span of a prompt's trace: from its first offer to its acceptance.

    Attributes:
      traceparent: for the prompt; empty without a provider.
    """

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: Any = None) -> None:
        self._span = span
        self.traceparent = "" if span is None else traceparent_of(span.get_span_context())

    def end(self, outcome: str) -> None:
        """Ends it; a second end changes nothing."""
        if self._span is not None:
            self._span.set_attribute("milepost.outcome", outcome)
            self._span.end()
            self._span = None


NO_SPAN = PromptSpan()


def begin(name: str, *, run_id: str, prompt_id: str) -> PromptSpan:
    """Begins the trace of one prompt, linked to the active span if there is one."""
    api = sys.modules.get(_API)
    if api is None:
        return NO_SPAN
    provider = _provider or api.get_tracer_provider()
    around = api.get_current_span().get_span_context()
    span = provider.get_tracer(_SCOPE).start_span(
        name,
        context=sys.modules["opentelemetry.context"].Context(),
        kind=api.SpanKind.PRODUCER,
        attributes={"milepost.run_id": run_id, "milepost.prompt_id": prompt_id},
        links=[api.Link(around)] if around.is_valid else None,
    )
    return PromptSpan(span) if span.get_span_context().is_valid else NO_SPAN
