"""Spans of services. Off until a provider is installed: then nothing is imported, and nothing is made.

    with tracing.span("rollout", parent=prompt.traceparent, prompt_id=prompt.prompt_id) as span:
        ...                                  # the span is active here, and in tasks that are started here
        span.set(outcome="sealed")

| parent             | the span                                                         |
|--------------------|------------------------------------------------------------------|
| a `traceparent`    | is a child of it; where that is not sampled there is no span     |
| None (the default) | is a child of the active span                                    |

Where there is no parent, or rubbish, there is no span, or with `begins` a new trace, if the sampler wills.
"No span" is `NOTHING`, which takes every call and does nothing, so that callers need not ask. On paths where
even that is too much, ask `tracing.on` first.

Keywords become attributes, `run_id=...` is `milepost.run_id`; empty ones are left out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self

from milepost import tracing as client

Value = str | int | float | bool | None
Kind = Literal["internal", "server", "client"]

on = False
"""A provider is installed."""

_FORM = re.compile(
    r"(?!ff)[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-([0-9a-f]{2})(?:-|$)", re.ASCII
)
_trace: Any = None
_context: Any = None
_tracer: Any = None


class Span:
    """A span that is not made; what every span can do.

    Attributes:
      traceparent: for those who go on with the trace elsewhere; empty: there is none.
      trace_id: 32 hex digits; empty: there is none.
    """

    __slots__ = ()
    traceparent = ""
    trace_id = ""

    def set(self, **attributes: Value) -> None:
        """Adds attributes."""

    def end(self, *, end_ns: int | None = None) -> None:
        """Ends it, now or at a time in nanoseconds since 1970."""

    def fail(self, why: str) -> None:
        """Marks what it stands for as failed."""

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


NOTHING = Span()


class _Made(Span):
    """A span of the SDK; as a context manager it is active until it ends."""

    __slots__ = ("_span", "_token", "trace_id", "traceparent")

    def __init__(self, span: Any) -> None:
        self._span, self._token = span, None
        self.traceparent = client.traceparent_of(span.get_span_context())
        self.trace_id = self.traceparent[3:35]

    def set(self, **attributes: Value) -> None:
        self._span.set_attributes(_named(attributes))

    def end(self, *, end_ns: int | None = None) -> None:
        self._span.end(end_ns)

    def fail(self, why: str) -> None:
        self._span.set_status(_trace.StatusCode.ERROR, why)

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> Self:
        self._token = _context.attach(_trace.set_span_in_context(self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _context.detach(self._token)
        if error is not None:
            self.fail(f"{type(error).__name__}: {error}")
        self._span.end()


def install(provider: Any) -> None:
    """Makes spans with this provider of OpenTelemetry's SDK from now on; None: no more."""
    global on, _trace, _context, _tracer
    client.use_provider(provider)
    on = provider is not None
    if on:
        from opentelemetry import context, trace

        _trace, _context, _tracer = trace, context, provider.get_tracer("milepost")


def span(
    name: str,
    *,
    parent: str | None = None,
    begins: bool = False,
    links: Iterable[str] = (),
    kind: Kind = "internal",
    start_ns: int | None = None,
    **attributes: Value,
) -> Span:
    """Starts a span, to be used as a context manager, or to be ended by `end`; see the module.

    Args:
      name: what is done; one of few.
      parent: `traceparent` of the parent; None: the active span.
      begins: without a parent, begin a trace.
      links: `traceparent` of each span of other traces that has to do with it; empty ones are passed over. A
        trace that begins linked to a sampled one is sampled.
      kind: "server" for the receiving side of a call, "client" for the calling one.
      start_ns: when it started, in nanoseconds since 1970; None: now.
      attributes: see the module.
    """
    if not on:
        return NOTHING
    above = _FORM.match(client.active() if parent is None else parent)
    if not (begins if above is None else _is_sampled(above)):
        return NOTHING
    made = _tracer.start_span(
        name,
        context=_under(above),
        kind=_trace.SpanKind[kind.upper()],
        attributes=_named(attributes),
        links=[_trace.Link(_span_context(at)) for at in map(_FORM.match, links) if at],
        start_time=start_ns,
    )
    return _Made(made) if made.is_recording() else NOTHING


def annotate(**attributes: Value) -> None:
    """Adds attributes to the active span, if there is one."""
    if on:
        _trace.get_current_span().set_attributes(_named(attributes))


@contextmanager
def apart() -> Generator[None]:
    """Leaves the active span while the block runs: tasks that are started in it belong to no trace."""
    if not on:
        yield
        return
    token = _context.attach(_trace.set_span_in_context(_trace.INVALID_SPAN))
    try:
        yield
    finally:
        _context.detach(token)


def sampled(traceparent: str) -> bool:
    """Whether this is a `traceparent` whose trace is recorded."""
    at = _FORM.match(traceparent)
    return at is not None and _is_sampled(at)


def trace_id() -> str:
    """Of the active span, 32 hex digits; empty without one."""
    return client.active()[3:35] if on else ""


def wall_ns(perf_counter_s: float) -> int:
    """A moment of `time.perf_counter` in nanoseconds since 1970, for spans of what has already happened."""
    return time.time_ns() - round((time.perf_counter() - perf_counter_s) * 1e9)


def _is_sampled(at: re.Match[str]) -> bool:
    return bool(int(at[3], 16) & 1)


def _under(at: re.Match[str] | None) -> Any:
    """The context of a child of `at`."""
    nowhere = _context.Context()
    if at is None:
        return nowhere
    return _trace.set_span_in_context(_trace.NonRecordingSpan(_span_context(at)), nowhere)


def _span_context(at: re.Match[str]) -> Any:
    flags = _trace.TraceFlags(int(at[3], 16))
    return _trace.SpanContext(int(at[1], 16), int(at[2], 16), is_remote=True, trace_flags=flags)


def _named(attributes: Mapping[str, Value]) -> dict[str, Any]:
    return {f"milepost.{name}": value for name, value in attributes.items() if value not in (None, "")}
