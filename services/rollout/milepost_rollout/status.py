"""What the gateway counts about itself. One instance a process, written by its loops, read by GetStatus."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable

from milepost.types import Evaluation, Sample

_RECENT_REWARDS = 256


class Counters:
    """Counts since the start, and in words what is waited for."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._rewards: deque[float] = deque(maxlen=_RECENT_REWARDS)
        self.groups_sealed = 0
        self.tokens_generated = 0
        self.outcomes: Counter[str] = Counter()
        self.settled: Counter[str] = Counter()
        """What became of groups, by word: sealed, duplicate, lease_lost, released, dropped, ..."""
        self.samples_in_flight = 0
        self.leasing = ""
        """Why the lease loop gets nothing."""
        self.engines = ""
        """Why engines cannot be asked; empty while they answer."""
        self.ledger = ""
        """Why groups cannot be settled; empty while they are."""
        self.last_evaluation: Evaluation | None = None

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def reward_mean(self) -> float:
        """Mean reward of the last 256 sealed samples; 0 before the first."""
        return sum(self._rewards) / len(self._rewards) if self._rewards else 0.0

    @property
    def waiting_for(self) -> str:
        """In words, what holds the gateway up; empty when nothing does."""
        return "; ".join(text for text in (self.engines, self.ledger, self.leasing) if text)

    def sampled(self, sample: Sample) -> None:
        """A sample came to its end."""
        self.outcomes[sample.outcome.name.lower()] += 1
        self.tokens_generated += int(sample.loss_mask.sum())

    def sealed(self, rewards: Iterable[float]) -> None:
        """A group was sealed."""
        self.groups_sealed += 1
        self._rewards.extend(r for r in rewards if r == r)
