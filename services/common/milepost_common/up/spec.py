"""What the supervisor is told about one child; pure data, made by `plan` or by a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Addresses = Mapping[str, Mapping[str, str]]
"""`host:port` by protocol, by child."""


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """One child.

    Attributes:
      name: unique, for example "engine-0"; names its log.
      command: builds program and arguments from the addresses that are known when it is started, its own
        among them on a restart, so that it can listen where it listened before.
      needs: children that must have been ready once before it is started.
      announces: it prints a readiness line; a child that does not is ready when it runs.
      final_codes: exit statuses after which it is not started again.
      ends_run: those of them that end everything, and the supervisor's exit status then; any other means that
        its work is over while the others go on.
      stop_rank: children of a lower rank are stopped first.
      ready_timeout_s: a start that takes longer is ended and counts as a death.
      stop_timeout_s: how long it may take to stop.
      liveness_timeout_s: once ready, it is killed when nobody there has answered for so long; 0: never.
      environ: variables set beside those of the supervisor.
    """

    name: str
    command: Callable[[Addresses], list[str]]
    needs: tuple[str, ...] = ()
    announces: bool = True
    final_codes: frozenset[int] = frozenset()
    ends_run: Mapping[int, int] = field(default_factory=dict[int, int])
    stop_rank: int = 0
    ready_timeout_s: float = 180.0
    stop_timeout_s: float = 35.0
    liveness_timeout_s: float = 0.0
    environ: Mapping[str, str] = field(default_factory=dict[str, str])
