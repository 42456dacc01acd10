"""One sample in the making, and the spans of weight versions its tokens were drawn from.

    QUEUED --admitted--> RUNNING --stop | length | abort--> FINISHED
       ^                    |
       +----- retracted ----+        (tokens kept, KV dropped and computed again)

A Generation is written by the scheduler thread alone, which only ever *appends* tokens and sets `finish`
last; other threads may read it at any time (read `finish` first, then the tokens). Version spans follow
SGLang 0.5.19: a list of `{"version": str, "start": int, "end": int}`, contiguous from 0 over the output
tokens, in which neighbours differ; without tokens, one empty span of the current version.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from milepost_engine.params import SamplingParams

if TYPE_CHECKING:
    import torch

FinishKind = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class FinishReason:
    """Why an output ended.

    Attributes:
        kind: "stop", "length" or "abort".
        matched: For a stop, the token id or string that ended it.
        length: For a length, the limit in tokens.
        message: For an abort, who asked.
    """

    kind: FinishKind
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None

    def to_json(self) -> dict[str, Any]:
        """SGLang's shape: the type and the one field that belongs to it."""
        if self.kind == "stop":
            return {"type": "stop", "matched": self.matched}
        if self.kind == "length":
            return {"type": "length", "length": self.length}
        return {"type": "abort", "message": self.message or "aborted"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobOptions:
    """Which log-probs a reply carries.

    Attributes:
        wanted: Report the log-prob of every output token.
        start_len: First prompt position whose log-probs are reported; -1 reports none of the prompt.
        top: Best alternatives to report at each position.
    """

    wanted: bool = False
    start_len: int = -1
    top: int = 0

    @property
    def of_input(self) -> bool:
        """The prompt's log-probs are wanted, which needs its logits at every position."""
        return self.wanted and self.start_len >= 0


class Listener(Protocol):
    """Whoever waits for a generation; told on the event loop that it has advanced or finished."""

    def on_progress(self, generation: Generation) -> None:
        """Called after new tokens, or at the end; several advances may arrive as one call."""


class StopStrings(Protocol):
    """Finds stop strings in a growing output."""

    def match(self, output_ids: list[int]) -> str | None:
        """The first stop string that the text now holds, if any."""
        ...


TopEntry = list[tuple[float, int]]


@dataclass(slots=True, eq=False, kw_only=True)
class Generation:
    """One output sequence of one prompt.

    Attributes:
        rid: The request id by which it can be aborted (prefixes match).
        prompt_ids: The prompt's tokens; shared between samples, never written.
        max_new_tokens: Limit after the context was taken into account.
        stop_ids: Tokens that end the output (empty under `ignore_eos`).
        created_s, admitted_s, finished_s: When it was submitted, first taken from the queue, and closed, on
            the clock of `time.perf_counter`; 0: not yet.
        output_ids, output_logprobs: What was drawn, and its log-probs in nats, of equal length.
        output_top: Best alternatives per output token, when asked for.
        input_logprobs, input_top: Of the prompt from `logprobs.start_len`, the first being None.
        cached_tokens: Prompt tokens whose KV was copied from a sibling instead of computed.
        version_marks: (version, tokens that stood when it ceased to be current), in order.
        final_version: Version of the engine when the output ended.
        generator: Source of randomness of a seeded request.
    """

    rid: str
    prompt_ids: list[int]
    params: SamplingParams
    logprobs: LogprobOptions
    max_new_tokens: int
    stop_ids: frozenset[int]
    stream: bool
    listener: Listener
    stop_strings: StopStrings | None = None
    created_s: float = field(default_factory=time.perf_counter)
    admitted_s: float = 0.0
    finished_s: float = 0.0
    output_ids: list[int] = field(default_factory=list[int])
    output_logprobs: list[float] = field(default_factory=list[float])
    output_top: list[TopEntry] = field(default_factory=list[TopEntry])
    input_logprobs: list[float | None] | None = None
    input_top: list[TopEntry | None] | None = None
    cached_tokens: int = 0
    version_marks: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    final_version: str | None = None
    generator: torch.Generator | None = None
    finish: FinishReason | None = None

    def end_of(self, token: int) -> FinishReason | None:
        """Whether the output ends with `token`, which has just been appended."""
        if token in self.stop_ids and len(self.output_ids) > self.params.min_new_tokens:
            return FinishReason("stop", matched=token)
        if self.stop_strings is not None:
            matched = self.stop_strings.match(self.output_ids)
            if matched is not None:
                return FinishReason("stop", matched=matched)
        if len(self.output_ids) >= self.max_new_tokens:
            return FinishReason("length", length=self.max_new_tokens)
        return None

    def close(self, reason: FinishReason, *, version: str) -> None:
        """Ends the output. The last write to this object."""
        self.final_version = version
        self.finished_s = time.perf_counter()
        self.finish = reason

    def mark_version(self, outgoing: str) -> None:
        """Notes that `outgoing` ceases to be the engine's version after the tokens drawn so far."""
        if self.output_ids:
            self.version_marks.append((outgoing, len(self.output_ids)))


def version_spans(marks: list[tuple[str, int]], current: str, num_tokens: int) -> list[dict[str, Any]]:
    """Turns version marks into contiguous spans over `[0, num_tokens)`.

    Args:
        marks: (version, end) pairs as `Generation.version_marks` holds them.
        current: The version of the tokens after the last mark.
        num_tokens: Output tokens to cover.

    Returns:
        `{"version", "start", "end"}` per run of equal versions; one empty span where there are no tokens.
    """
    spans: list[dict[str, Any]] = []
    start = 0
    for version, mark in [*marks, (current, num_tokens)]:
        end = min(mark, num_tokens)
        if spans and end <= start:
            continue
        if spans and spans[-1]["version"] == version:
            spans[-1]["end"] = end
        else:
            spans.append({"version": version, "start": start, "end": end})
        start = end
    return spans
