"""Who shares a process group: finds the engine that breaks groups, so that the others get their weights.

    all who need weights ── broke, nobody to blame ──> half of them ──> ... ──> one ── broke ──> a loner
            ^                                             │ committed
            └───────────────── twice as many ─────────────┘

A collective breaks for all of its members at once, and none can say whose fault it was: an engine that the
router reaches and the trainer does not looks like its innocent fellows. So a group that broke without a
culprit is made smaller until one engine breaks a group that it has for itself. That one is a *loner*: it
keeps what it has, and is tried alone, after the others and with pauses that double, until a commit clears it.
A new instance is no loner, unless it was started because it broke a group; and where all engines are, the
fault is the trainer's, and nobody is.

Pure: no tasks, no clock. Owned by `Transactions`, its only caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from milepost_router.record import EngineRecord

_Key = tuple[str, str]


@dataclass(frozen=True)
class _Loner:
    strikes: int
    not_before: float


class Grouping:
    """Memory of groups that broke.

    Args:
      pause_s: a loner's first pause.
      pause_max_s: where its doubling ends.
    """

    def __init__(self, *, pause_s: float, pause_max_s: float) -> None:
        self._pause_s, self._pause_max_s = pause_s, pause_max_s
        self._most: dict[str, int] = {}
        """Run -> members of its next group at most; absent: all."""
        self._loners: dict[_Key, _Loner] = {}

    def choose(self, run_id: str, needy: Sequence[EngineRecord], *, now: float) -> list[EngineRecord]:
        """Members of the next group, of the engines that need weights."""
        company = [e for e in needy if not self.is_loner(e)]
        if company:
            return company[: self._most.get(run_id)]
        waiting = sorted(
            ((self._loners[_key(e)].not_before, e.engine_id, e) for e in needy), key=lambda x: x[:2]
        )
        return [engine for not_before, _, engine in waiting if not_before <= now][:1]

    def is_loner(self, engine: EngineRecord) -> bool:
        """It broke a group of its own, and has got no weights since."""
        return _key(engine) in self._loners

    def broke(
        self, run_id: str, members: Sequence[EngineRecord], *, fleet: Sequence[EngineRecord], now: float
    ) -> None:
        """A group broke, and nobody is to blame so far.

        Args:
          run_id: its run.
          members: of the group.
          fleet: the run's engines.
          now: seconds.
        """
        self._most[run_id] = max(1, len(members) // 2)
        if len(members) > 1:
            return
        [alone] = members
        strikes = self._loners[_key(alone)].strikes + 1 if self.is_loner(alone) else 1
        pause_s = min(self._pause_s * 2 ** min(strikes - 1, 32), self._pause_max_s)
        self._loners[_key(alone)] = _Loner(strikes, now + pause_s)
        if all(self.is_loner(engine) for engine in fleet):
            self._loners.clear()

    def committed(
        self, run_id: str, members: Sequence[EngineRecord], *, fleet: Sequence[EngineRecord]
    ) -> None:
        """A group got its weights."""
        for engine in members:
            self._loners.pop(_key(engine), None)
        if (most := self._most.get(run_id)) is not None:
            self._most[run_id] = 2 * max(most, len(members))
            if self._most[run_id] >= len(fleet):
                del self._most[run_id]


def _key(engine: EngineRecord) -> _Key:
    return engine.engine_id, "" if engine.capabilities.restartable else engine.instance_id
