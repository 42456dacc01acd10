"""When a child is started again, and when that is given up: a pure state machine.

    PENDING --spawned--> STARTING --ready--> READY
                           |  ^                |
                    exited |  | spawned        | exited
                           v  |                v
                          BACKOFF <------------+
    any running state: exit code that is final -> DONE;  asked to stop, then exited -> STOPPED
    STARTING: bad settings (exit 2, never ready), or too many early deaths -> FAILED
    STARTING, READY: bad settings `crash_limit` times in a row -> FAILED

An *early death* is one before the child was ready. `crash_limit` of them within `window_s` are a failure;
while it has never been ready at all they count whenever they happened, for then nothing suggests that waiting
helps. Some settings are found wrong only after a child is ready (a run's reward, once there is a run): such a
child says so with exit 2 each time, and is believed in the end. The supervisor owns one `Life` a child and
replaces it at each event; time comes from outside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

BAD_SETTINGS = 2


class Phase(StrEnum):
    """Where a child stands."""

    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "restarting"
    DONE = "done"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"

    @property
    def is_running(self) -> bool:
        """True while there is a process."""
        return self in (Phase.STARTING, Phase.READY, Phase.STOPPING)

    @property
    def is_over(self) -> bool:
        """True when no process will be started any more."""
        return self in (Phase.DONE, Phase.FAILED, Phase.STOPPED)


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """How patient the supervisor is.

    Attributes:
      first_delay_s: wait before the first restart; doubles with each further death, up to `max_delay_s`.
      max_delay_s: longest wait.
      settled_s: a child that was ready for this long starts over with the first delay.
      crash_limit: early deaths, or exits for bad settings, that make a failure.
      window_s: within this time.
    """

    first_delay_s: float = 0.5
    max_delay_s: float = 10.0
    settled_s: float = 10.0
    crash_limit: int = 5
    window_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Life:
    """One child's account; times are seconds of one monotonic clock."""

    phase: Phase = Phase.PENDING
    starts: int = 0
    ready_at_s: float = 0.0
    was_ready: bool = False
    deaths_in_a_row: int = 0
    early_deaths_s: tuple[float, ...] = ()
    refusals_in_a_row: int = 0
    exit_code: int | None = None

    def spawned(self) -> Life:
        """A process was started."""
        return replace(self, phase=Phase.STARTING, starts=self.starts + 1, exit_code=None)

    def ready(self, now_s: float) -> Life:
        """It printed its readiness line."""
        if self.phase is not Phase.STARTING:
            return self
        return replace(self, phase=Phase.READY, ready_at_s=now_s, was_ready=True, early_deaths_s=())

    def stopping(self) -> Life:
        """It was asked to stop, or will not be started."""
        if self.phase.is_over:
            return self
        return replace(self, phase=Phase.STOPPING if self.phase.is_running else Phase.STOPPED)

    def exited(
        self,
        code: int,
        *,
        now_s: float,
        final_codes: frozenset[int] = frozenset(),
        policy: RestartPolicy,
    ) -> tuple[Life, float]:
        """Its process ended.

        Args:
          code: exit status; negative: the signal that ended it.
          now_s: the time.
          final_codes: statuses that mean that its work is done.
          policy: how patient to be.

        Returns:
          The new account, and the seconds to wait before the next start (0 unless the phase is BACKOFF).
        """
        refusals = self.refusals_in_a_row + 1 if code == BAD_SETTINGS else 0
        ended = replace(self, exit_code=code, refusals_in_a_row=refusals)
        if self.phase is Phase.STOPPING:
            return replace(ended, phase=Phase.STOPPED), 0.0
        if code in final_codes:
            return replace(ended, phase=Phase.DONE), 0.0
        if self.phase is Phase.READY:
            settled = now_s - self.ready_at_s >= policy.settled_s
            in_a_row = 0 if settled else self.deaths_in_a_row
        else:
            in_a_row = self.deaths_in_a_row
            ended = replace(ended, early_deaths_s=(*self._recent(now_s, policy), now_s))
        if ended._hopeless(policy):
            return replace(ended, phase=Phase.FAILED), 0.0
        delay_s = min(policy.max_delay_s, policy.first_delay_s * 2.0**in_a_row)
        return replace(ended, phase=Phase.BACKOFF, deaths_in_a_row=in_a_row + 1), delay_s

    def _recent(self, now_s: float, policy: RestartPolicy) -> tuple[float, ...]:
        if not self.was_ready:
            return self.early_deaths_s
        return tuple(at for at in self.early_deaths_s if now_s - at <= policy.window_s)

    def _hopeless(self, policy: RestartPolicy) -> bool:
        if self.exit_code == BAD_SETTINGS and not self.was_ready:
            return True
        return max(len(self.early_deaths_s), self.refusals_in_a_row) >= policy.crash_limit
