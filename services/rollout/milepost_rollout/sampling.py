"""Sampling parameters: a prompt's overrides over the run's over the defaults, and as SGLang's dictionary."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from milepost.types import SamplingParams

DEFAULTS = SamplingParams(
    temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0, max_new_tokens=128, ignore_eos=False
)


def resolve(*layers: SamplingParams | None) -> SamplingParams:
    """Puts layers on top of one another, the first the strongest, the defaults at the bottom."""
    chosen = DEFAULTS
    for layer in reversed(layers):
        if layer is not None:
            given = {f.name: v for f in fields(layer) if (v := getattr(layer, f.name)) not in (None, ())}
            chosen = replace(chosen, **given)
    return chosen


def to_engine(params: SamplingParams, *, max_new_tokens: int, index: int) -> dict[str, Any]:
    """SGLang's `sampling_params` for sample `index` of a group; `params` comes from `resolve`."""
    engine: dict[str, Any] = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "max_new_tokens": max_new_tokens,
        "ignore_eos": params.ignore_eos,
    }
    if params.stop:
        engine["stop"] = params.stop
    if params.stop_token_ids:
        engine["stop_token_ids"] = params.stop_token_ids
    if params.seed is not None:
        engine["sampling_seed"] = params.seed + index
    return engine
