"""Milepost: RL post-training of language models as services. This package is its public client.

from milepost import BufferClient, Prompt, PromptItem
"""

from milepost._version import __version__
from milepost.client import (
    BufferClient,
    EnvironmentClient,
    RewardClient,
    RolloutClient,
    RouterClient,
    TrainerClient,
    WeightClient,
)
from milepost.errors import MilepostError
from milepost.types import (
    ChatMessage,
    Group,
    Outcome,
    Prompt,
    PromptItem,
    RolloutOptions,
    RunConfig,
    Sample,
    SamplingParams,
)

__all__ = [
    "BufferClient",
    "ChatMessage",
    "EnvironmentClient",
    "Group",
    "MilepostError",
    "Outcome",
    "Prompt",
    "PromptItem",
    "RewardClient",
    "RolloutClient",
    "RolloutOptions",
    "RouterClient",
    "RunConfig",
    "Sample",
    "SamplingParams",
    "TrainerClient",
    "WeightClient",
    "__version__",
]
