"""The rewards that come with Milepost; pure functions of one sample."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any, Literal

from milepost_rollout.rewards.contract import RewardSample


def exact(sample: RewardSample) -> float:
    """1 where the response equals the label, both without surrounding white space."""
    return float(sample.response.strip() == sample.label.strip())


def regex(pattern: str) -> Callable[[RewardSample], float]:
    """The reward `regex:PATTERN`: searches the response.

    With a group in the pattern: 1 where its first group equals the label, both stripped. Without: 1 where it
    matches.
    """
    compiled = re.compile(pattern)

    def matches(sample: RewardSample) -> float:
        found = compiled.search(sample.response)
        if found is None:
            return 0.0
        if not compiled.groups:
            return 1.0
        return float((found.group(1) or "").strip() == sample.label.strip())

    return matches


def math() -> Callable[[RewardSample], float]:
    """The reward `math`: response and label mean the same, as math-verify sees it.

    math-verify's own alarms are off: the worker that runs it can be killed. A label that it cannot read is an
    error, for a zero would blame the model.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarms are off
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def read(text: str, fallback: Literal["no_fallback", "first_match"]) -> Any:
        return parse(text, extraction_config=targets, fallback_mode=fallback, parsing_timeout=0)

    def read_label(label: str) -> Any:
        # A bare label is LaTeX without its dollars: "3\\sqrt{2}" alone would be read as 3.
        bare = "$" not in label and "\\boxed" not in label
        gold = (bare and read(f"${label}$", "no_fallback")) or read(label, "no_fallback")
        if not gold:
            raise ValueError(f"label {label!r} is no LaTeX and no number; write it as math-verify reads it")
        return gold

    def same(sample: RewardSample) -> float:
        if sample.response.strip() == sample.label.strip():
            return 1.0
        gold = read_label(sample.label)
        return float(verify(gold, read(sample.response, "first_match"), timeout_seconds=0))

    return same
