"""A sample in the making: prompt, what the model wrote, what an environment said between.

Masks are right by construction: each piece of tokens is appended with its mask and log-probs, prompt and
environment with 0, the model with 1. Owned by the task that makes the sample.
"""

from __future__ import annotations

import numpy as np

from milepost.types import Int32Array, Outcome, Sample, VersionSpan
from milepost_rollout.replies import Generation

Mark = tuple[int, tuple[VersionSpan, ...], int, int, bool]


class Draft:
    """Tokens, masks, log-probs and spans of a sample so far."""

    def __init__(self, prompt_ids: Int32Array) -> None:
        self._tokens = [prompt_ids]
        self._masks = [np.zeros(len(prompt_ids), np.uint8)]
        self._logprobs = [np.zeros(len(prompt_ids), np.float32)]
        self._spans: list[VersionSpan] = []
        self.prompt_length = len(prompt_ids)
        self.length = len(prompt_ids)
        self.generated = 0
        """Tokens that the model wrote."""
        self.exact = True
        self.engine_id = ""

    def add_model(self, generation: Generation) -> None:
        """Appends what the model wrote; continues the last span where the version is the same."""
        for span in generation.spans:
            self._add_span(self.length + span.start, self.length + span.end, span.weight_version)
        self.exact = self.exact and (generation.exact or not len(generation.output_ids))
        self.engine_id = generation.engine_id or self.engine_id
        count = len(generation.output_ids)
        self._append(generation.output_ids, np.ones(count, np.uint8), generation.logprobs)
        self.generated += count

    def add_environment(self, ids: Int32Array) -> None:
        """Appends what the model did not write."""
        self._append(ids, np.zeros(len(ids), np.uint8), np.zeros(len(ids), np.float32))

    def mark(self) -> Mark:
        """Where the draft stands, for `rewind`."""
        return (len(self._tokens), tuple(self._spans), self.length, self.generated, self.exact)

    def rewind(self, mark: Mark) -> None:
        """Forgets what was appended since `mark`."""
        pieces, spans, self.length, self.generated, self.exact = mark
        self._spans = list(spans)
        for part in (self._tokens, self._masks, self._logprobs):
            del part[pieces:]

    @property
    def tokens(self) -> Int32Array:
        """Everything so far, int32 [length]."""
        return np.concatenate(self._tokens) if len(self._tokens) > 1 else self._tokens[0]

    @property
    def response(self) -> Int32Array:
        """Everything after the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    def versions(self) -> set[int]:
        """Weight versions that wrote a token."""
        return {span.weight_version for span in self._spans}

    def finish(self, *, index: int, outcome: Outcome, text: str = "", error: str = "") -> Sample:
        """The sample; one with an error outcome is not trained on, so its mask is zero."""
        mask, logprobs = np.concatenate(self._masks), np.concatenate(self._logprobs)
        if outcome.is_error:
            mask, logprobs = np.zeros_like(mask), np.zeros_like(logprobs)
        return Sample(
            index=index,
            tokens=self.tokens,
            loss_mask=mask,
            logprobs=logprobs,
            prompt_length=self.prompt_length,
            version_spans=tuple(self._spans),
            version_spans_exact=self.exact and bool(self._spans),
            outcome=outcome,
            text=text,
            error=error,
            engine_id=self.engine_id,
        )

    def _append(self, tokens: Int32Array, mask: np.ndarray, logprobs: np.ndarray) -> None:
        self._tokens.append(tokens)
        self._masks.append(mask)
        self._logprobs.append(logprobs)
        self.length += len(tokens)

    def _add_span(self, start: int, end: int, version: int) -> None:
        last = self._spans[-1] if self._spans else None
        if last is not None and last.end == start and last.weight_version == version:
            self._spans[-1] = VersionSpan(start=last.start, end=end, weight_version=version)
        else:
            self._spans.append(VersionSpan(start=start, end=end, weight_version=version))
