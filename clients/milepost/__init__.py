"""Milepost: RL post-training of language models as services. This package is its public client.

from milepost import BufferClient, Prompt, PromptItem

Names are imported when first asked for: a command that asks for health needs neither numpy nor stubs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from milepost._version import __version__
from milepost.errors import MilepostError

if TYPE_CHECKING:
    from milepost.client import (
        BufferClient,
        EnvironmentClient,
        RewardClient,
        RolloutClient,
        RouterClient,
        TrainerClient,
        WeightClient,
    )
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

_HOMES = ("milepost.client", "milepost.types")


def __getattr__(name: str) -> Any:
    """Finds a public name in the module that defines it (PEP 562)."""
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(home)
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
