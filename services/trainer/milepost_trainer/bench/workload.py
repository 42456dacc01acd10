"""The sequences of a bench: groups as they come from the buffer, drawn from a seed, alike for both loops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from milepost_trainer.batch import TrainSequence
from milepost_trainer.plan import GroupInfo, StepPlan, plan_step
from milepost_trainer.prepare import TrainGroup
from milepost_trainer.settings import BenchSettings

_FILL = 0.97
"""Of the micro-batches' budget: what remains is what packing leaves free."""


@dataclass(frozen=True)
class Workload:
    """One step's groups, and the plan over them.

    Attributes:
        groups: by prompt id.
        plan: of one update.
    """

    groups: dict[str, TrainGroup]
    plan: StepPlan

    @property
    def fed(self) -> list[int]:
        """Tokens of each sequence that go through the model: all but the last."""
        return [len(s.tokens) - 1 for group in self.groups.values() for s in group.sequences]


def draw(step: int, settings: BenchSettings, *, vocabulary: int, max_tokens: int, num_ranks: int) -> Workload:
    """Draw a step's groups of `samples_per_prompt` and plan one update over them.

    Lengths are uniform between `min_length` and `max_length`, prompts have `prompt_tokens` without loss, the
    engine's log-probs scatter around those of a policy that knows nothing.
    """
    rng, sizes = (np.random.default_rng((settings.seed, step, part)) for part in range(2))
    wanted = settings.micro_batches * num_ranks * max_tokens
    if settings.min_length < settings.max_length:
        wanted = int(wanted * _FILL)
    groups: dict[str, TrainGroup] = {}
    tokens = 0
    while tokens < wanted:
        samples: list[TrainSequence] = []
        for _ in range(settings.samples_per_prompt):
            size = min(int(sizes.integers(settings.min_length, settings.max_length + 1)), wanted - tokens)
            if size > settings.prompt_tokens:
                samples.append(_sequence(rng, size, settings.prompt_tokens, vocabulary))
            tokens += size
        if samples:
            groups[f"{step}/{len(groups)}"] = TrainGroup(rng.normal(size=len(samples)), tuple(samples))
    infos = [GroupInfo(name, tuple(len(s.tokens) for s in g.sequences)) for name, g in groups.items()]
    plan = plan_step(step, infos, num_ranks=num_ranks, updates=1, max_tokens=max_tokens)
    return Workload(groups, plan)


def _sequence(rng: np.random.Generator, size: int, prompt: int, vocabulary: int) -> TrainSequence:
    mask = np.ones(size, np.uint8)
    mask[:prompt] = 0
    logprobs = rng.normal(-math.log(vocabulary), 0.1, size).astype(np.float32) * mask
    tokens = rng.integers(0, vocabulary, size).astype(np.int32)
    return TrainSequence(tokens=tokens, loss_mask=mask, logprobs=logprobs)
