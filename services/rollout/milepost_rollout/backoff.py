"""How long to wait before asking again."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BackoffPolicy:
    """Waits of `first_s`, doubling up to `most_s`, each cut by up to half at random."""

    first_s: float = 0.05
    most_s: float = 2.0


class Backoff:
    """The waits of one loop."""

    def __init__(self, policy: BackoffPolicy) -> None:
        self._policy = policy
        self._next_s = policy.first_s

    def reset(self) -> None:
        """Something went well: start with short waits again."""
        self._next_s = self._policy.first_s

    def next_s(self, *, asked_s: float | None = None) -> float:
        """The next wait; `asked_s` is what the other side asked for."""
        wait_s = self._next_s if asked_s is None else min(asked_s, self._policy.most_s)
        self._next_s = min(2 * self._next_s, self._policy.most_s)
        return wait_s * random.uniform(0.5, 1.0)
