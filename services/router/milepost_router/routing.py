"""Which engine takes a request: a gate, then a policy. Pure functions over records; nothing here waits.

The gate: SERVING, of the request's run, at a version that the request accepts, not tried yet.
The policy: a session stays with the engine that rendezvous hashing gives it, and moves only when that one
leaves or its version does not fit; a request without a session goes where fewest are in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from milepost.types import EngineState
from milepost_router.record import EngineRecord

Policy = Literal["least_in_flight", "session_affinity"]
_COMING = (EngineState.UPDATING, EngineState.JOINING)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request demands of its engine.

    Attributes:
      run_id: the run whose weights; empty: any.
      min_version: this version or a newer one; 0: any.
      version: exactly this version; 0: any.
      session: requests of one session go to one engine; empty: none.
    """

    run_id: str = ""
    min_version: int = 0
    version: int = 0
    session: str = ""

    def describe(self) -> str:
        """In words, for errors."""
        parts = [f"run {self.run_id!r}" if self.run_id else "any run"]
        if self.version:
            parts.append(f"version {self.version} exactly")
        if self.min_version:
            parts.append(f"version {self.min_version} or newer")
        return ", ".join(parts)


ANY = Ask()
"""Of a request that demands nothing. `choose` knows it by identity: most requests are such ones."""


def accepts(ask: Ask, record: EngineRecord) -> bool:
    """The engine's run and version fit, whatever its state."""
    if ask.run_id and record.run_id not in ("", ask.run_id):
        return False
    if ask.version and record.version != ask.version:
        return False
    return record.version >= ask.min_version


def choose(
    engines: Iterable[EngineRecord],
    ask: Ask,
    *,
    tried: Sequence[EngineRecord] = (),
    policy: Policy = "session_affinity",
) -> EngineRecord | None:
    """The engine for a request, or None where none fits now."""
    if ask is ANY and not tried:
        return _least_loaded(engines)
    fitting = [e for e in engines if e.routable and accepts(ask, e) and e not in tried]
    if len(fitting) < 2:
        return fitting[0] if fitting else None
    if ask.session and policy == "session_affinity":
        return max(fitting, key=lambda e: _rendezvous(ask.session, e.engine_id))
    return min(fitting, key=_load)


def may_come(engines: Iterable[EngineRecord], ask: Ask) -> bool:
    """An engine that could fit is on its way: waiting for it is better than an error."""
    for engine in engines:
        of_run = not ask.run_id or engine.run_id in ("", ask.run_id)
        coming = engine.state in _COMING or engine.expected
        if of_run and (coming or (engine.state is EngineState.SERVING and engine.suspect)):
            return True
    return False


def describe_fleet(engines: Iterable[EngineRecord], ask: Ask) -> str:
    """What the fleet serves, for the error that nobody fits."""
    mine = [e for e in engines if not ask.run_id or e.run_id in ("", ask.run_id)]
    if not mine:
        return "no engine of that run is known"
    return "; ".join(
        f"{e.engine_id} {e.state.name}{f' version {e.version}' if e.version else ''}"
        f"{'' if e.state is EngineState.SERVING else f' ({e.detail})'}"
        for e in sorted(mine, key=lambda e: e.engine_id)
    )


def _least_loaded(engines: Iterable[EngineRecord]) -> EngineRecord | None:
    """The same choice for a request that demands nothing, without a list and a key for each engine."""
    best: EngineRecord | None = None
    for engine in engines:
        if engine.state is not EngineState.SERVING or engine.suspect or engine.leaving:
            continue
        if best is None or (engine.in_flight <= best.in_flight and _load(engine) < _load(best)):
            best = engine
    return best


def _load(engine: EngineRecord) -> tuple[int, int, str]:
    return engine.in_flight, engine.requests_total, engine.engine_id


def _rendezvous(session: str, engine_id: str) -> bytes:
    return blake2b(f"{session}\0{engine_id}".encode(), digest_size=8).digest()
