"""What the router knows of one engine. `milepost_router.fleet` alone writes it; everybody else reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from milepost import types as t
from milepost.types import EngineState
from milepost_router import version_string
from milepost_router.version_string import LoadedVersion

S = EngineState


@dataclass(slots=True, eq=False)
class EngineRecord:
    """One engine.

    Attributes:
      home_run: the run it was configured for; empty: any run may claim it.
      run_id: the run it belongs to now.
      version: what it serves; while UPDATING the old one until the new one is complete, or may be; 0: none.
      version_string: what it carries as far as we know, proven or not.
      generation: grows with every change of what is known about its weights.
      transaction: the weight transaction that it is a member of; empty: none.
      unnamed: the transaction in which it was served from before it was named; see `awaits_name`.
      suspect: a connection to it broke and no probe has looked at it since.
      leaving: drained or removed.
      healed: it answered a probe since it was quarantined.
      eligible_at: not a member of a transaction before this time.
      strikes: failures in a row that quarantined it.
      cleaning: transactions that still tell it that they are over: it is nobody's member meanwhile.
      expected: STALE, but whoever trains is about to give it weights.
      restart: it hangs in a collective for good: out of everything until it has been started again.
      lives: how often it was started, as far as we know.
      generated_at: when tokens of it came last.
      takes_signals: our loader in it can repeat the order that it did last by a signal.
      caches_prefixes: it may hold KV of prefixes under older weights, unless told to forget them.
      paused_since: when we paused it; None: it runs.
      paused_total: seconds of ended pauses.
    """

    engine_id: str
    url: str
    home_run: str = ""
    run_id: str = ""
    instance_id: str = ""
    admin_api_key: str = field(default="", repr=False)
    capabilities: t.EngineCapabilities = field(default_factory=t.EngineCapabilities)
    state: EngineState = S.JOINING
    version: int = 0
    label: int = 0
    version_string: str = ""
    detail: str = "waits for its first probe"
    generation: int = 0
    transaction: str = ""
    unnamed: str = ""
    suspect: bool = False
    leaving: bool = False
    healed: bool = False
    eligible_at: float = 0.0
    strikes: int = 0
    cleaning: int = 0
    expected: bool = False
    restart: bool = False
    lives: int = 0
    takes_signals: bool = False
    caches_prefixes: bool = True
    probe_failures: int = 0
    request_failures: int = 0
    in_flight: int = 0
    requests_total: int = 0
    failures_total: int = 0
    last_seen: float = 0.0
    generated_at: float = float("-inf")
    paused_since: float | None = None
    paused_total: float = 0.0

    @property
    def routable(self) -> bool:
        """It may be sent new requests."""
        return self.state is S.SERVING and not self.suspect and not self.leaving

    @property
    def keys_prefixes(self) -> bool:
        """It finds cached prefixes by a key of their request too (see `prefix_key`)."""
        return self.caches_prefixes and self.capabilities.engine.startswith("sglang")

    @property
    def awaits_name(self) -> bool:
        """It is served from, and its string does not name what it holds yet."""
        return bool(self.transaction) and self.unnamed == self.transaction

    @property
    def loaded(self) -> LoadedVersion | None:
        """The complete weights its string names, proven or not."""
        return version_string.parse(self.version_string)

    def paused_s(self, now: float) -> float:
        """Seconds it has been paused by us since it joined."""
        return self.paused_total + (0.0 if self.paused_since is None else now - self.paused_since)

    def snapshot(self, now: float) -> t.Engine:
        """As the contract shows it."""
        serves = self.state in (S.SERVING, S.UPDATING, S.DRAINING)
        return t.Engine(
            engine_id=self.engine_id,
            url=self.url,
            run_id=self.run_id,
            instance_id=self.instance_id,
            capabilities=self.capabilities,
            state=self.state,
            weight_version=self.version if serves else 0,
            weight_label=self.label if serves else 0,
            in_flight=self.in_flight,
            detail=self.detail,
            last_seen_ago_s=max(0.0, now - self.last_seen),
            requests_total=self.requests_total,
            failures_total=self.failures_total,
        )


@dataclass(frozen=True)
class Transition:
    """An engine went from one state to another.

    Attributes:
      engine, before, after: which one, and its states.
      withdrawn: what it serves or may have gone on with was refused or given up: what was generated under
        that is worth nothing.
    """

    engine: EngineRecord
    before: EngineState
    after: EngineState
    withdrawn: bool = False
