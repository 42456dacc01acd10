"""Learning-rate schedules: pure functions of the update's number, so that resuming needs no state."""

from __future__ import annotations

import math
from typing import Literal

ScheduleKind = Literal["constant", "linear", "cosine"]


def learning_rate(
    update: int,
    *,
    peak: float,
    kind: ScheduleKind = "constant",
    warmup_updates: int = 0,
    total_updates: int = 0,
    final_fraction: float = 0.0,
) -> float:
    """Rate of one optimizer update.

    Rises linearly over the warm-up (update 0 already moves), then stays, or falls to ``final_fraction *
    peak`` at ``total_updates`` along a line or half a cosine, and stays there.

    Args:
        update: updates made before this one, from 0.
        peak: the rate after the warm-up.
        kind: what follows the warm-up.
        warmup_updates: length of the warm-up.
        total_updates: where the decay ends; unused by ``constant``.
        final_fraction: of the peak, at the end.

    Returns:
        The rate.
    """
    if update < warmup_updates:
        return peak * (update + 1) / warmup_updates
    if kind == "constant":
        return peak
    span = max(1, total_updates - warmup_updates)
    progress = min(1.0, (update - warmup_updates) / span)
    fall = 1 - progress if kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (final_fraction + (1 - final_fraction) * fall)
