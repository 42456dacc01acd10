"""Payloads of groups, as the buffer hands them out -> what the learner takes, and what a transcript shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from milepost.convert import open_group
from milepost.types import GroupPayload, Prompt, Sample
from milepost_trainer.batch import TrainSequence
from milepost_trainer.prepare import TrainGroup


def read_payloads(payloads: Mapping[str, bytes]) -> dict[str, GroupPayload]:
    """Unpack payloads; one that cannot be read is left out, and the learner will name it."""
    opened: dict[str, GroupPayload] = {}
    for prompt_id, payload in payloads.items():
        try:
            opened[prompt_id] = open_group(payload)
        except (DecodeError, ValueError):
            continue
    return opened


def to_train_group(payload: GroupPayload, *, default_temperature: float) -> TrainGroup:
    """A group as the learner takes it.

    Args:
        payload: the unpacked payload.
        default_temperature: of the run, where the prompt does not override it.
    """
    temperature = _temperature(payload.prompt, default_temperature)
    return TrainGroup(
        rewards=np.array([sample.reward for sample in payload.samples], dtype=np.float64),
        sequences=tuple(_sequence(sample, temperature) for sample in payload.samples),
    )


def write_transcripts(path: Path, *, step: int, payloads: Iterable[GroupPayload]) -> None:
    """One line a sample: prompt, response, reward, outcome."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for payload in payloads:
            for sample in payload.samples:
                file.write(json.dumps(_transcript(step, payload.prompt, sample), ensure_ascii=False) + "\n")


def _temperature(prompt: Prompt, default: float) -> float:
    if prompt.sampling is not None and prompt.sampling.temperature is not None:
        return prompt.sampling.temperature
    return default


def _sequence(sample: Sample, temperature: float) -> TrainSequence:
    return TrainSequence(
        tokens=sample.tokens,
        loss_mask=sample.loss_mask,
        logprobs=sample.logprobs,
        temperature=temperature,
    )


def _transcript(step: int, prompt: Prompt, sample: Sample) -> dict[str, Any]:
    if prompt.messages is not None:
        shown: Any = [{"role": m.role, "content": m.content} for m in prompt.messages]
    else:
        shown = prompt.text if prompt.text is not None else sample.tokens[: sample.prompt_length].tolist()
    return {
        "step": step,
        "prompt_id": prompt.prompt_id,
        "sample": sample.index,
        "prompt": shown,
        "response": sample.text,
        "label": prompt.label,
        "reward": sample.reward if np.isfinite(sample.reward) else None,
        "reward_parts": dict(sample.reward_parts),
        "outcome": sample.outcome.name.lower(),
        "num_tokens": len(sample.tokens),
        "weight_versions": sorted({span.weight_version for span in sample.version_spans}),
    }
