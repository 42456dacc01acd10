"""Schedules: values at the corners, by hand."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from milepost_trainer.schedule import learning_rate
from milepost_trainer.settings import ScheduleSettings


def test_warm_up_moves_from_the_first_update() -> None:
    assert [learning_rate(u, peak=1.0, warmup_updates=4) for u in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize("kind, middle", [("linear", 0.55), ("cosine", 0.55)])
def test_decay_ends_at_the_final_fraction(kind: str, middle: float) -> None:
    def rate(update: int) -> float:
        return learning_rate(
            update, peak=2.0, kind=kind, warmup_updates=10, total_updates=30, final_fraction=0.1
        )

    assert rate(10) == pytest.approx(2.0)
    assert rate(20) == pytest.approx(2 * middle)
    assert rate(30) == rate(99) == pytest.approx(0.2)


def test_cosine_falls_slower_at_first() -> None:
    linear, cosine = (
        learning_rate(5, peak=1.0, kind=kind, total_updates=20) for kind in ("linear", "cosine")
    )
    assert linear == pytest.approx(0.75)
    assert cosine == pytest.approx(0.853553, abs=1e-6)


def test_a_decay_without_an_end_is_refused() -> None:
    with pytest.raises(ValidationError, match="total_updates is 0"):
        ScheduleSettings(kind="cosine")
