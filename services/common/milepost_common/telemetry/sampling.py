"""Which traces are recorded: those whose parent is; those linked to a recorded one; a share of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import (
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import Link, SpanKind
from opentelemetry.trace.span import TraceState


def sampler_of(ratio: float) -> Sampler:
    """The sampler of a service.

    Args:
      ratio: share of the traces that begin here without a link to a recorded one.
    """
    return ParentBased(root=LinkedOrRatio(ratio))


class LinkedOrRatio(Sampler):
    """For spans without a parent. A trainer's step is recorded when a group in it is, whatever the ratio."""

    def __init__(self, ratio: float) -> None:
        self._rest = TraceIdRatioBased(ratio)

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Decides about one trace."""
        if any(link.context.trace_flags.sampled for link in links or ()):
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, trace_state)
        return self._rest.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        """In words."""
        return f"LinkedOrRatio{{{self._rest.get_description()}}}"
