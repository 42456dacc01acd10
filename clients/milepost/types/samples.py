"""Prompts, samples and groups: the data that moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milepost.types.enums import Outcome

Int32Array = NDArray[np.int32]
UInt8Array = NDArray[np.uint8]
Float32Array = NDArray[np.float32]


def _i32() -> Any:
    return field(default_factory=lambda: np.empty(0, np.int32), metadata={"dtype": "<i4"})


def _u8() -> Any:
    return field(default_factory=lambda: np.empty(0, np.uint8), metadata={"dtype": "|u1"})


def _f32() -> Any:
    return field(default_factory=lambda: np.empty(0, np.float32), metadata={"dtype": "<f4"})


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn; None takes the run's value, then the engine's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What is rolled out. Exactly one of `text`, `messages` and `input_ids` (int32, [num_tokens]) is set."""

    prompt_id: str
    text: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    input_ids: Int32Array | None = None
    label: str = ""
    metadata_json: str = ""
    sampling: SamplingParams | None = None
    reward: str = ""
    traceparent: str = ""


@dataclass(frozen=True, kw_only=True)
class VersionSpan:
    """Tokens [start, end) of `Sample.tokens` were generated under `weight_version`."""

    start: int
    end: int
    weight_version: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One trainable token sequence.

    `tokens` int32, `loss_mask` uint8 and `logprobs` float32 (nats, at the sampling temperature, 0 where the
    mask is 0) have one length: prompt and response.
    """

    index: int = 0
    tokens: Int32Array = _i32()
    loss_mask: UInt8Array = _u8()
    logprobs: Float32Array = _f32()
    prompt_length: int = 0
    version_spans: tuple[VersionSpan, ...] = ()
    version_spans_exact: bool = False
    reward: float = float("nan")
    reward_parts: Mapping[str, float] = field(default_factory=dict[str, float])
    outcome: Outcome = Outcome.UNSPECIFIED
    text: str = ""
    error: str = ""
    metadata_json: str = ""
    engine_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True, kw_only=True)
class GroupHeader:
    """What the ledger checks of a group; per-sample fields are ordered by sample index."""

    prompt_id: str
    attempt: int
    num_tokens: tuple[int, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    weight_versions: tuple[int, ...] = ()
    rewards: tuple[float, ...] = ()
    num_loss_tokens: int = 0
    digest: bytes = b""
    traceparent: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The samples of one prompt, sealed as a whole; `payload` is a serialized GroupPayload."""

    header: GroupHeader
    payload: bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupPayload:
    """What a learner reads of a group."""

    prompt: Prompt
    samples: tuple[Sample, ...]
