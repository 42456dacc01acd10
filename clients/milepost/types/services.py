"""What gateways, trainers, rewards and environments answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from milepost.types.samples import ChatMessage, Sample, SamplingParams


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """How a stream of prompts is rolled out."""

    samples_per_prompt: int = 0
    sampling: SamplingParams | None = None
    reward: str = ""
    run_id: str = ""
    weight_version: int = 0
    max_concurrent_groups: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectories:
    """The scored samples of one prompt, or why it was refused."""

    prompt_id: str
    samples: tuple[Sample, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out prompts scored at one weight version."""

    weight_version: int = 0
    weight_label: int = 0
    reward_mean: float = 0.0
    num_scored: int = 0
    num_requested: int = 0
    failures: Mapping[str, int] = field(default_factory=dict[str, int])
    response_tokens_mean: float = 0.0
    duration_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RolloutStatus:
    """What a gateway is doing."""

    instance_id: str = ""
    run_id: str = ""
    paused: bool = False
    groups_in_flight: int = 0
    samples_in_flight: int = 0
    groups_sealed: int = 0
    tokens_generated: int = 0
    outcomes: Mapping[str, int] = field(default_factory=dict[str, int])
    reward_mean: float = 0.0
    waiting_for: str = ""
    last_evaluation: Evaluation | None = None
    uptime_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainerStatus:
    """What a trainer is doing."""

    run_id: str = ""
    term: int = 0
    phase: str = ""
    waiting_for: str = ""
    step: int = 0
    published_step: int = 0
    weight_version: int = 0
    checkpoint_step: int = 0
    world_size: int = 0
    uptime_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint; step 0 with an empty path when it is not there yet."""

    step: int = 0
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """The metrics of one step by name."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class RewardParts:
    """Named parts of one sample's reward."""

    parts: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One reward a sample, in order, and optionally named parts."""

    rewards: tuple[float, ...] = ()
    parts: tuple[RewardParts, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EnvironmentTurn:
    """What an environment answers."""

    messages: tuple[ChatMessage, ...] = ()
    done: bool = False
    reward: float = 0.0
