"""Spans of the ledger: a prompt is put, leased, and its group sealed, each in the trace of the prompt.

A prompt that comes without a trace begins one when it is put; the prompt is kept with it. Callers ask
`tracing.on` first: without tracing nothing here runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from milepost import types as t
from milepost_common.telemetry import tracing
from milepost_common.telemetry.tracing import Span


def begin_put(run_id: str, messages: Sequence[Any]) -> list[Span]:
    """Begins the span of each prompt of a `PutPrompts`, and writes new traces into those without one."""
    spans: list[Span] = []
    for message in messages:
        span = tracing.span(
            "buffer.put",
            parent=message.traceparent,
            begins=True,
            kind="server",
            run_id=run_id,
            prompt_id=message.prompt_id,
        )
        if span and not tracing.sampled(message.traceparent):
            message.traceparent = span.traceparent
        spans.append(span)
    return spans


def end_put(spans: Sequence[Span], *, accepted: int) -> None:
    """Ends the spans of those that were accepted; the others will be put again, and are not told."""
    for span in spans[:accepted]:
        span.end()


def leased(run_id: str, gateway_id: str, leases: Sequence[Any]) -> None:
    """Tells that prompts were handed out."""
    now = time.time_ns()
    for lease in leases:
        tracing.span(
            "buffer.lease",
            parent=lease.prompt.traceparent,
            kind="server",
            start_ns=now,
            run_id=run_id,
            prompt_id=lease.prompt.prompt_id,
            attempt=lease.attempt,
            version=lease.min_version,
            label=lease.label,
            gateway_id=gateway_id,
        ).end()


def sealed(
    run_id: str, groups: Sequence[t.Group], results: Sequence[t.SealResult], *, started_ns: int
) -> None:
    """Tells what became of groups that were put."""
    for group, result in zip(groups, results, strict=True):
        header = group.header
        span = tracing.span(
            "buffer.seal",
            parent=header.traceparent,
            kind="server",
            start_ns=started_ns,
            run_id=run_id,
            prompt_id=header.prompt_id,
            attempt=header.attempt,
            outcome=result.status.name.lower(),
            payload_bytes=len(group.payload),
        )
        if result.message:
            span.fail(result.message)
        span.end()
