"""What becomes of a leased group: sealed, given back, or dropped with a reason. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from milepost.errors import InvalidArgument
from milepost.types import DropReason, ErrorPolicy, Outcome, RunConfig, Sample

REASONS = {
    Outcome.ENV_ERROR: DropReason.ENV_ERROR,
    Outcome.REWARD_ERROR: DropReason.REWARD_ERROR,
    Outcome.ENGINE_ERROR: DropReason.ENGINE_ERROR,
    Outcome.ABORTED: DropReason.ENGINE_ERROR,
}


@dataclass(frozen=True, kw_only=True)
class Seal:
    """Seal the group with these samples."""

    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class Release:
    """Give the prompt back, or drop it.

    Attributes:
      drop_reason: drop it now; unspecified gives it back.
      failed: it counts against `max_attempts`, and is dropped with `exhausted_reason` at the last.
      detail: what happened, for the ledger row.
    """

    drop_reason: DropReason = DropReason.UNSPECIFIED
    failed: bool = False
    exhausted_reason: DropReason = DropReason.UNSPECIFIED
    detail: str = ""

    @property
    def word(self) -> str:
        """For counters and logs."""
        if self.drop_reason:
            return f"dropped_{self.drop_reason.name.lower()}"
        return "failed" if self.failed else "released"


GIVEN_BACK = Release(detail="the gateway stops")
CAME_PAUSED = Release(detail="the gateway was paused while it was leased")
ANSWER_LOST = Release(detail="the answer that leased it was lost")


def judge(samples: Sequence[Sample], config: RunConfig) -> Seal | Release:
    """Applies the run's `error_policy` and `filter_equal_rewards` to a group that was rolled out and scored.

    Under `mask`, a group without a single token to train on is treated as under `retry`: there is nothing to
    seal.
    """
    failed = [s for s in samples if s.outcome.is_error]
    policy = config.error_policy or ErrorPolicy.RETRY
    if failed and (policy is not ErrorPolicy.MASK or not any(s.loss_mask.any() for s in samples)):
        return _failure(failed[0], drop=policy is ErrorPolicy.DROP)
    if config.filter_equal_rewards and (reward := _equal_reward(samples)) is not None:
        detail = f"filter_equal_rewards: every reward is {reward:g}"
        return Release(drop_reason=DropReason.FILTER, detail=detail)
    return Seal(samples=tuple(samples))


def refuse(error: InvalidArgument) -> Release:
    """A prompt that can never be rolled out."""
    return Release(drop_reason=DropReason.INVALID, detail=str(error))


def fails_fast(config: RunConfig) -> bool:
    """True where one failed sample decides the group, so that the others need not go on."""
    return config.error_policy is not ErrorPolicy.MASK


def _failure(sample: Sample, *, drop: bool) -> Release:
    reason = REASONS[sample.outcome]
    detail = f"{sample.outcome.name}: {sample.error}"
    if drop:
        return Release(drop_reason=reason, detail=detail)
    return Release(failed=True, exhausted_reason=reason, detail=detail)


def _equal_reward(samples: Sequence[Sample]) -> float | None:
    """The reward that two or more scored samples all have; None where they differ or there are fewer."""
    rewards = [s.reward for s in samples if not s.outcome.is_error]
    return rewards[0] if len(rewards) > 1 and len(set(rewards)) == 1 else None
