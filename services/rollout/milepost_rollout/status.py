"""What the gateway counts about itself. One instance a process, written by its loops, read by GetStatus and
as metrics."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterable

from milepost.types import Evaluation, Outcome, Sample
from milepost_common.metrics import Counter as Metric
from milepost_common.metrics import Histogram, Instrument, Phases, Watched
from milepost_rollout import metrics as m

_RECENT_REWARDS = 256
_RECENT_SAMPLES = 256


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
        self._leasing = self._engines = self._ledger = ""
        self._waits = Phases(m.WAITING, first=m.NOTHING)
        self._truncated: deque[bool] = deque(maxlen=_RECENT_SAMPLES)
        self.asks = Metric(m.ASKS)
        """Requests to engines by result."""
        for result in m.RESULTS:
            self.asks.cell(result)
        self.sample_seconds = Histogram(m.SAMPLE_SECONDS)
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
    def leasing(self) -> str:
        """Why the lease loop gets nothing; begins with what it waits for and a colon."""
        return self._leasing

    @leasing.setter
    def leasing(self, why: str) -> None:
        self._leasing = why
        self._note_wait()

    @property
    def engines(self) -> str:
        """Why engines cannot be asked; empty while they answer."""
        return self._engines

    @engines.setter
    def engines(self, why: str) -> None:
        if why != self._engines:
            self._engines = why
            self._note_wait()

    @property
    def ledger(self) -> str:
        """Why groups cannot be settled; empty while they are."""
        return self._ledger

    @ledger.setter
    def ledger(self, why: str) -> None:
        self._ledger = why
        self._note_wait()

    def _note_wait(self) -> None:
        """The time from now on goes to what holds most up."""
        first = next((text for text in (self._engines, self._ledger, self._leasing) if text), m.NOTHING)
        self._waits.enter(first.partition(":")[0])

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """What it counts, as metrics."""
        outcomes = [o.name.lower() for o in Outcome if o]
        return (
            Watched(m.SAMPLES, lambda: (((o,), self.outcomes[o]) for o in outcomes)),
            Watched(m.SETTLED, lambda: (((word,), n) for word, n in self.settled.copy().items())),
            m.one(m.TOKENS, lambda: self.tokens_generated),
            m.one(m.TRUNCATED, lambda: self._share_truncated),
            m.one(m.SAMPLES_IN_FLIGHT, lambda: self.samples_in_flight),
            m.one(m.EVALUATION_REWARD, lambda: e.reward_mean if (e := self.last_evaluation) else math.nan),
            m.one(m.EVALUATION_LABEL, lambda: e.weight_label if (e := self.last_evaluation) else math.nan),
            self._waits,
            self.asks,
            self.sample_seconds,
        )

    @property
    def _share_truncated(self) -> float:
        recent = self._truncated.copy()
        return sum(recent) / len(recent) if recent else math.nan

    @property
    def waiting_for(self) -> str:
        """In words, what holds the gateway up; empty when nothing does."""
        return "; ".join(text for text in (self.engines, self.ledger, self.leasing) if text)

    def sampled(self, sample: Sample) -> None:
        """A sample came to its end."""
        self.outcomes[sample.outcome.name.lower()] += 1
        self.tokens_generated += int(sample.loss_mask.sum())
        self._truncated.append(sample.outcome is Outcome.TRUNCATED)

    def sealed(self, rewards: Iterable[float]) -> None:
        """A group was sealed."""
        self.groups_sealed += 1
        self._rewards.extend(r for r in rewards if r == r)
