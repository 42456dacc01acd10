"""Spans of requests whose trace is recorded: the request, and in it the time in the queue and at work.

    engine.generate  [ from the body to the end of the reply                    ]
    engine.queue       [ submitted .. admitted ]
    engine.decode                              [ prefill and decoding .. closed ]

Nothing is measured for them: a generation knows when it was created, admitted and closed. A retraction in
between belongs to `engine.decode`.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import Scope

from milepost.tracing import TRACEPARENT
from milepost_common.telemetry import tracing
from milepost_common.telemetry.tracing import Span, Value
from milepost_engine.generation import Generation

_NAME = TRACEPARENT.encode()


def begin(scope: Scope, *, engine_id: str) -> Span:
    """The span of a request."""
    if not tracing.on:
        return tracing.NOTHING
    parent = next((value for name, value in scope["headers"] if name == _NAME), b"")
    return tracing.span(
        "engine.generate",
        parent=parent.decode("latin-1"),
        kind="server",
        engine_id=engine_id,
        path=scope["path"],
    )


def tell(generations: Sequence[Generation]) -> None:
    """Tells what became of those generations of the active span's request that are finished."""
    if not tracing.trace_id():
        return
    for generation in generations:
        if generation.finish is None:
            continue
        tracing.annotate(**_outcome(generation))
        created, closed = (tracing.wall_ns(s) for s in (generation.created_s, generation.finished_s))
        admitted = tracing.wall_ns(generation.admitted_s) if generation.admitted_s else closed
        tracing.span("engine.queue", start_ns=created).end(end_ns=admitted)
        decode = tracing.span("engine.decode", start_ns=admitted)
        decode.set(**_outcome(generation))
        decode.end(end_ns=closed)


def _outcome(generation: Generation) -> dict[str, Value]:
    version = generation.final_version or ""
    return {
        "weight_version": version,
        "version": _number(version),
        "num_tokens": len(generation.output_ids),
        "outcome": generation.finish.kind if generation.finish else None,
    }


def _number(weight_version: str) -> int | None:
    """The number in `<run>/<version>/<label>`; None in any other string."""
    parts = weight_version.split("/")
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else None
