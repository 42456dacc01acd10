"""What rewards take and give. Imported by the workers, so it needs the standard library alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class RewardSample:
    """One sample as a reward function sees it.

    Attributes:
      prompt_id: the prompt's name.
      index: the sample's position in its group, from 0.
      prompt: text that the model was given, a conversation after its chat template.
      messages: the conversation, `{"role", "content"}` each; empty for text and token prompts.
      response: decoded response without special tokens.
      label: what the prompt's author wants compared.
      metadata: the prompt's JSON object.
      prompt_tokens: ids of the prompt.
      response_tokens: ids after the prompt, an environment's among them.
      outcome: "completed" or "truncated".
    """

    prompt_id: str
    index: int
    prompt: str
    response: str
    label: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    prompt_tokens: tuple[int, ...] = ()
    response_tokens: tuple[int, ...] = ()
    outcome: str = "completed"


@dataclass(frozen=True, kw_only=True)
class Score:
    """A sample's reward; `error` is set, and `reward` NaN, when there is none."""

    reward: float = NAN
    parts: Mapping[str, float] = field(default_factory=dict[str, float])
    error: str = ""


class BadReward(Exception):
    """A reward returned something else than a finite number."""


def read_score(value: Any) -> Score:
    """Reads what a function returned for one sample.

    Raises:
      BadReward: it is neither a finite number nor a mapping with one under `reward`.
    """
    if isinstance(value, Mapping):
        if "reward" not in value:
            raise BadReward(f"returned a mapping without the key 'reward' (it has {sorted(map(str, value))})")
        parts = {str(k): _number(v, f"part {k!r}") for k, v in value.items() if k != "reward"}
        return Score(reward=_number(value["reward"], "'reward'"), parts=parts)
    return Score(reward=_number(value, "the value"))


def _number(value: Any, what: str) -> float:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise BadReward(f"{what} returned is {_shorten(repr(value))}, not a number; return a finite float")
    number = float(value)
    if not math.isfinite(number):
        raise BadReward(f"{what} returned is {number}; return a finite float")
    return number


def _shorten(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[:most] + "..."
