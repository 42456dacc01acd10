"""The fleet: every engine the router knows, as a pure state machine. No tasks, no clients, no clock.

                        probe ok                 admit(version)
    join ──> JOINING ──────────────────> STALE ─────────────────> SERVING(v) <───────┐
                │                         │ ▲  <───── outdated ─────┘ │              │ finish_update(v),
                │            begin_update │ │ break_off  begin_update │              │ restore
                │                         └─┴──────> UPDATING <───────┴──────────────┤
                │ failed probes                          │                           │
                └──> DEAD ── probe ok ──> STALE          └─ failed ──> QUARANTINED ──┘ begin_update
    drain: ──> DRAINING (out of UPDATING only when that is over)      remove: forgotten

Invariants:
- An engine becomes SERVING only out of STALE (`admit`: its weights were proven) or UPDATING
  (`finish_update`, `restore`); never out of DEAD, JOINING or QUARANTINED.
- Probe failures and request failures are counted apart; neither counts while UPDATING, because an engine
  that is paused for an update does not answer as usual and is not ill.
- A member of a transaction carries its id from `reserve` until the transaction is settled for it or it is
  DEAD, and belongs to no other. It is UPDATING only from the first bucket on: until then it serves.
- `suspect` takes an engine out of routing without a change of state, from the moment a connection to it
  broke until a probe has looked: a process that came up again on the same port holds other weights.
- `fleet_epoch` grows with each join, leave, death and return; `revision` with all a watcher may want to see.
- `restart` keeps an engine out of routing and of transactions until another process answers in its place:
  nothing else ends a collective that hangs. Its launcher is told by the answer to a heartbeat.
- `generation` of an engine grows with every change of what is known about its weights: what a probe read
  under an older generation says nothing any more.

Times are seconds of any monotonic clock, given by the caller. The service owns one Fleet, its only writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from milepost import types as t
from milepost.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from milepost.types import EngineState
from milepost_router import version_string
from milepost_router.record import EngineRecord, Transition
from milepost_router.version_string import LoadedVersion

S = EngineState

_ARROWS: dict[EngineState, frozenset[EngineState]] = {
    S.JOINING: frozenset({S.STALE, S.DRAINING, S.DEAD}),
    S.STALE: frozenset({S.JOINING, S.SERVING, S.UPDATING, S.DRAINING, S.QUARANTINED, S.DEAD}),
    S.SERVING: frozenset({S.JOINING, S.STALE, S.UPDATING, S.DRAINING, S.QUARANTINED, S.DEAD}),
    S.UPDATING: frozenset({S.JOINING, S.STALE, S.SERVING, S.DRAINING, S.QUARANTINED}),
    S.DRAINING: frozenset({S.JOINING, S.DEAD}),
    S.QUARANTINED: frozenset({S.JOINING, S.STALE, S.UPDATING, S.DRAINING, S.DEAD}),
    S.DEAD: frozenset({S.JOINING, S.STALE, S.DRAINING}),
}
_ALIVE = frozenset({S.STALE, S.SERVING, S.QUARANTINED})


@dataclass(frozen=True, kw_only=True)
class FleetLimits:
    """When an engine is given up.

    Attributes:
      probe_failures: failed probes in a row after which it is DEAD.
      request_failures: failed requests in a row after which it is QUARANTINED.
      quarantine_s: first time out of transactions after a failure; doubles with each one.
      quarantine_max_s: where the doubling ends.
    """

    probe_failures: int = 3
    request_failures: int = 5
    quarantine_s: float = 1.0
    quarantine_max_s: float = 60.0


class Fleet:
    """The engines and their states.

    Args:
      unversioned: there is no ledger: every engine that answers serves version 0.
      limits: when an engine is given up.
    """

    def __init__(self, *, unversioned: bool = False, limits: FleetLimits | None = None) -> None:
        self.unversioned = unversioned
        self.fleet_epoch = 1
        self.revision = 0
        self._limits = limits or FleetLimits()
        self._engines: dict[str, EngineRecord] = {}
        self._listeners: list[Callable[[Transition | None], None]] = []

    # ------------------------------------------------------------------------------------ reading

    def __iter__(self) -> Iterator[EngineRecord]:
        return iter(self._engines.values())

    def get(self, engine_id: str) -> EngineRecord | None:
        """The engine of that name, if it is known."""
        return self._engines.get(engine_id)

    def known(self, engine_id: str) -> EngineRecord:
        """The engine of that name.

        Raises:
          NotFound: it is not known.
        """
        record = self._engines.get(engine_id)
        if record is None:
            known = ", ".join(sorted(self._engines)) or "none"
            raise NotFound(f"engine_id = {engine_id!r} is not known (known: {known}); register it first")
        return record

    def of_run(self, run_id: str) -> list[EngineRecord]:
        """Engines of a run and unclaimed ones, ordered by name; an empty run means all."""
        chosen = (e for e in self._engines.values() if not run_id or e.run_id in ("", run_id))
        return sorted(chosen, key=lambda e: e.engine_id)

    def highest_version(self, run_id: str) -> int:
        """Highest number that any engine's string of this run names, proven or not."""
        loaded = [e.loaded for e in self._engines.values()]
        return max((v.version for v in loaded if v is not None and v.run_id == run_id), default=0)

    def eligible(self, record: EngineRecord, now: float) -> bool:
        """It may become a member of a weight transaction."""
        if record.state not in _ALIVE or record.transaction or record.suspect or record.leaving:
            return False
        if record.cleaning or record.restart:
            return False
        return record.state is not S.QUARANTINED or (record.healed and now >= record.eligible_at)

    def subscribe(self, listener: Callable[[Transition | None], None]) -> None:
        """Calls `listener` after every change: with the transition, or None where no state changed."""
        self._listeners.append(listener)

    # ------------------------------------------------------------------------------------ joining and leaving

    def join(self, engine: t.Engine, *, now: float, admin_api_key: str = "") -> EngineRecord:
        """Adds an engine, or brings one back; the same instance asked again changes nothing.

        Raises:
          InvalidArgument: no name or no URL.
          AlreadyExists: the name belongs to a living engine at another URL.
        """
        if not engine.engine_id:
            raise InvalidArgument("engine.engine_id is empty; give the engine a name")
        if not engine.url.startswith(("http://", "https://")):
            raise InvalidArgument(f"engine.url = {engine.url!r} is no URL; give http://host:port")
        record = self._engines.get(engine.engine_id)
        if record is not None and record.url == engine.url and record.instance_id == engine.instance_id:
            return record
        if record is not None and record.url != engine.url and record.state is not S.DEAD:
            raise AlreadyExists(
                f"engine.engine_id = {engine.engine_id!r} is at {record.url} and alive; "
                f"choose another name for {engine.url}, or remove the old one"
            )
        if record is not None:
            self._restart(record, engine, now, admin_api_key)
            return record
        for other in [e for e in self._engines.values() if e.url == engine.url]:
            self.remove(other.engine_id)  # who listens there now is the truth
        record = EngineRecord(engine.engine_id, engine.url, home_run=engine.run_id, run_id=engine.run_id)
        self._engines[engine.engine_id] = record
        self._introduce(record, engine, now, admin_api_key)
        self._note(record, S.UNSPECIFIED)
        return record

    def _restart(self, record: EngineRecord, engine: t.Engine, now: float, key: str) -> None:
        before = record.state
        record.url, record.home_run, record.run_id = engine.url, engine.run_id, engine.run_id
        record.transaction, record.leaving = "", False
        record.probe_failures = record.request_failures = 0
        self._forget_weights(record)
        self._introduce(record, engine, now, key)
        if before is S.JOINING:
            self._changed(None)
        else:
            self._move(record, S.JOINING, "registered again by a new instance; waits for its first probe")

    def _introduce(self, record: EngineRecord, engine: t.Engine, now: float, key: str) -> None:
        record.instance_id, record.last_seen = engine.instance_id, now
        self._begin_life(record)
        record.admin_api_key = key or record.admin_api_key
        record.capabilities = engine.capabilities or record.capabilities
        self.fleet_epoch += 1

    @staticmethod
    def _begin_life(record: EngineRecord) -> None:
        record.restart = record.takes_signals = False
        record.lives += 1

    def remove(self, engine_id: str) -> bool:
        """Forgets an engine; False when it was not known."""
        record = self._engines.pop(engine_id, None)
        if record is None:
            return False
        self.fleet_epoch += 1
        record.leaving, record.transaction = True, ""
        before, record.state = record.state, S.DEAD
        record.detail = "removed"
        self._changed(Transition(record, before, S.DEAD) if before is not S.DEAD else None)
        return True

    def drain(self, engine_id: str) -> EngineRecord:
        """Takes an engine out of routing for good; one that is UPDATING when its transaction is over."""
        record = self.known(engine_id)
        record.leaving = True
        if record.state in (S.UPDATING, S.DRAINING) or record.awaits_name:
            self._changed(None)
        else:
            self._move(record, S.DRAINING, "drained by request")
        return record

    # ------------------------------------------------------------------------------------ signs of life

    def heartbeat(self, engine_id: str, instance_id: str, *, now: float) -> t.Heard:
        """An engine says that it lives; returns its state, and whether it must be started again.

        Raises:
          NotFound: it is not known, or by another instance: it has to register.
        """
        record = self._engines.get(engine_id)
        if record is None or record.instance_id != instance_id:
            raise NotFound(
                f"engine_id = {engine_id!r} with instance_id = {instance_id!r} is not known; register again"
            )
        record.last_seen = now
        return t.Heard(state=record.state, restart=record.restart)

    def probe_ok(self, record: EngineRecord, text: str, *, generation: int, now: float) -> None:
        """It answered a probe and carries the version string `text`, read under `generation`."""
        record.last_seen, record.probe_failures = now, 0
        removed = self._engines.get(record.engine_id) is not record
        if removed or generation != record.generation or record.state is S.UPDATING or record.awaits_name:
            return
        was_suspect, record.suspect = record.suspect, False
        restarted = bool(record.version_string) and text != record.version_string
        if record.state is S.QUARANTINED and text.startswith(version_string.UPDATING):
            restarted = False  # our own mark, written before it failed
        record.version_string = text
        registers = record.restart and record.capabilities.restartable  # its launcher says when it is ready
        if (restarted or record.state is S.DEAD) and not registers:
            self._begin_life(record)
        if record.state in (S.JOINING, S.DEAD):
            self.fleet_epoch += record.state is S.DEAD
            self._move(record, S.STALE, _why_stale(text))
        elif restarted and not self.unversioned and record.state in (S.SERVING, S.QUARANTINED, S.STALE):
            self._make_stale(record, f"restarted: {_why_stale(text)}")
        elif record.state is S.QUARANTINED:
            self._heal(record, now)
        elif was_suspect:
            self._changed(None)
        if self.unversioned and record.state is S.STALE:
            self._move(record, S.SERVING, "serves; there is no ledger, so its weights have no version")

    def _heal(self, record: EngineRecord, now: float) -> None:
        if not record.healed:
            record.healed = True
            self._changed(None)
        if self.unversioned and now >= record.eligible_at:
            record.request_failures = 0
            self._move(record, S.STALE, "answers again")

    def probe_failed(self, record: EngineRecord, why: str, *, generation: int) -> None:
        """It did not answer a probe, or answered rubbish; not counted while UPDATING."""
        if generation != record.generation or record.state is S.UPDATING or record.state is S.DEAD:
            return
        record.probe_failures += 1
        record.healed = False
        if record.probe_failures >= self._limits.probe_failures:
            self._forget_weights(record)
            record.run_id, record.transaction = record.home_run, ""
            self.fleet_epoch += 1
            self._move(record, S.DEAD, f"{record.probe_failures} probes failed: {why}")

    # ------------------------------------------------------------------------------------ requests

    def request_started(self, record: EngineRecord) -> None:
        """A request was given to the engine."""
        record.in_flight += 1
        record.requests_total += 1

    def request_ended(self, record: EngineRecord, *, failed: bool = False, now: float = 0.0) -> None:
        """A request left the engine; `failed` where the engine is to blame."""
        record.in_flight -= 1
        if record.in_flight == 0 and record.state is S.DRAINING:
            self._changed(None)
        if not failed:
            record.request_failures = 0
            return
        record.failures_total += 1
        if record.state is S.UPDATING:
            return
        record.request_failures += 1
        if record.state is S.SERVING and record.request_failures >= self._limits.request_failures:
            self.quarantine(record, f"{record.request_failures} requests in a row failed", now=now)

    def generated(self, record: EngineRecord, now: float) -> None:
        """Tokens came from it."""
        record.generated_at = now

    def suspected(self, record: EngineRecord) -> None:
        """A connection to it broke: no new requests until a probe has looked at it."""
        if not record.suspect and record.state is not S.UPDATING:
            record.suspect = True
            self._changed(None)

    # ------------------------------------------------------------------------------------ weights

    def admit(self, record: EngineRecord, loaded: LoadedVersion, *, generation: int) -> bool:
        """The ledger holds the weights that its string names; False where that is no longer its string."""
        fits = generation == record.generation and record.state is S.STALE and record.loaded == loaded
        if not fits or record.transaction or record.home_run not in ("", loaded.run_id):
            return False
        record.run_id, record.version, record.label = loaded.run_id, loaded.version, loaded.label
        record.generation += 1
        self._move(record, S.SERVING, f"holds version {loaded.version}, which the ledger has as published")
        return True

    def explain(self, record: EngineRecord, why: str) -> None:
        """Says in words why an engine is STALE."""
        if record.state is S.STALE and record.detail != why:
            record.detail = why
            self._changed(None)

    def capable(self, record: EngineRecord, capabilities: t.EngineCapabilities) -> None:
        """What an engine can do became known."""
        if record.capabilities != capabilities:
            record.capabilities = capabilities
            self._changed(None)

    def reserve(self, record: EngineRecord, transaction: str, *, run_id: str) -> None:
        """Makes it a member of a transaction and its run's own; it goes on serving.

        Raises:
          FailedPrecondition: it is a member of another one.
        """
        if record.transaction:
            raise FailedPrecondition(
                f"engine {record.engine_id} takes part in transaction {record.transaction}; wait for its end"
            )
        if record.run_id != run_id and record.state is S.SERVING:
            self._make_stale(record, f"claimed by run {run_id}")
        record.transaction, record.run_id = transaction, run_id
        self._changed(None)

    def release(self, record: EngineRecord) -> None:
        """Its transaction ended before it was touched."""
        record.transaction = ""
        self._changed(None)

    def begin_update(self, record: EngineRecord, *, now: float, runs_on: bool = False) -> None:
        """The first bucket comes: no new requests, and the pause begins, unless it runs on."""
        record.generation += 1
        record.paused_since = None if runs_on else now
        self._move(record, S.UPDATING, f"is being updated by {record.transaction}")

    def may_write(self, record: EngineRecord, loaded: LoadedVersion) -> None:
        """It may generate with these weights before it is known to hold them: replies that end name them."""
        record.version, record.label = loaded.version, loaded.label
        record.generation += 1

    def takes_signals(self, record: EngineRecord, yes: bool) -> None:
        """Whether our loader in it can repeat the order that it did last by a signal."""
        record.takes_signals = yes

    def withdraw(self, record: EngineRecord) -> None:
        """What it generates is worth nothing: its requests are taken from it."""
        self._note(record, record.state, withdrawn=True)

    def loaded_version(self, record: EngineRecord, loaded: LoadedVersion) -> None:
        """Its new weights are complete; it is named and resumes next, so replies may hold their tokens."""
        record.version_string = str(loaded)
        record.version, record.label = loaded.version, loaded.label
        record.generation += 1

    def serve_unnamed(self, record: EngineRecord, *, now: float) -> None:
        """It generates with its new weights; its name follows, and its transaction has it until then."""
        record.unnamed = record.transaction
        self._resumed(record, now)
        self._settle(record, S.SERVING, f"serves version {record.version}")

    def finish_update(self, record: EngineRecord, *, now: float) -> None:
        """It is named, and resumed at its new version."""
        record.transaction, record.strikes, record.request_failures = "", 0, 0
        record.generation += 1  # who looked at it before may have read its mark
        self._resumed(record, now)
        self._settle(record, S.SERVING, f"serves version {record.version}")

    def restore(self, record: EngineRecord, why: str, *, now: float) -> None:
        """Its transaction ended before it got a byte: back to what it was."""
        record.transaction = ""
        self._resumed(record, now)
        record.generation += 1
        complete = record.loaded is not None and record.version > 0
        self._settle(record, S.SERVING if complete else S.STALE, why)

    def break_off(
        self, record: EngineRecord, why: str, text: str, *, now: float, expected: bool = False
    ) -> None:
        """Its weights are nobody's: STALE, with the string `text` in it; `expected` where others are near."""
        record.transaction, record.expected = "", expected
        self._resumed(record, now)
        self._forget_weights(record)
        record.version_string = text
        self._settle(record, S.STALE, why)

    def quarantine(self, record: EngineRecord, why: str, *, now: float, restart: bool = False) -> None:
        """It failed: out of routing, and out of transactions for a while that grows with each failure.

        With `restart` until it has been started again.
        """
        record.restart = record.restart or restart
        if restart and record.state is S.UPDATING:
            record.version_string = version_string.updating(record.transaction)
        record.transaction, record.healed, record.suspect = "", False, False
        self._resumed(record, now)
        wait_s = min(self._limits.quarantine_s * 2**record.strikes, self._limits.quarantine_max_s)
        record.strikes = min(record.strikes + 1, 32)
        record.eligible_at = now + wait_s
        text = record.version_string
        self._forget_weights(record)
        record.version_string = text
        self._settle(record, S.QUARANTINED, why)

    def clean(self, record: EngineRecord, *, by: int) -> None:
        """A transaction begins (1) or ends (-1) to tell it that it is over."""
        record.cleaning += by
        self._changed(None)

    def outdate(self, run_id: str, version: int) -> None:
        """A newer version was committed: engines of the run that serve another one become STALE."""
        for record in self.of_run(run_id):
            if record.state is S.SERVING and record.version not in (0, version):
                self._make_stale(record, f"holds version {record.version}; the run is at {version}")

    def disown(self, run_id: str, version: int, why: str) -> None:
        """The ledger refused a version that is served already: nobody serves it any more."""
        for record in self.of_run(run_id):
            if record.state is S.SERVING and record.version == version:
                why_stale = f"version {version} was refused by the ledger: {why}"
                self._make_stale(record, why_stale, withdrawn=True)

    # ------------------------------------------------------------------------------------ within

    def _settle(self, record: EngineRecord, state: EngineState, why: str) -> None:
        """Ends an update; a drain that came in the meantime takes effect now."""
        if record.leaving:
            state, why = S.DRAINING, "drained by request"
        if record.state is state:
            self._changed(None)
        else:
            self._move(record, state, why)

    def _make_stale(self, record: EngineRecord, why: str, *, withdrawn: bool = False) -> None:
        text = record.version_string
        self._forget_weights(record)
        record.version_string = text
        if record.state is S.STALE:
            self.explain(record, why)
        else:
            self._move(record, S.STALE, why, withdrawn=withdrawn)

    def _forget_weights(self, record: EngineRecord) -> None:
        record.version = record.label = 0
        record.version_string = ""
        record.generation += 1

    @staticmethod
    def _resumed(record: EngineRecord, now: float) -> None:
        if record.paused_since is not None:
            record.paused_total += max(0.0, now - record.paused_since)
            record.paused_since = None

    def _move(self, record: EngineRecord, state: EngineState, why: str, *, withdrawn: bool = False) -> None:
        before = record.state
        if state not in _ARROWS[before]:
            raise AssertionError(f"engine {record.engine_id}: no arrow from {before.name} to {state.name}")
        record.state, record.detail = state, why
        record.expected = record.expected and state is S.STALE
        self._note(record, before, withdrawn=withdrawn)

    def _note(self, record: EngineRecord, before: EngineState, *, withdrawn: bool = False) -> None:
        self._changed(Transition(record, before, record.state, withdrawn))

    def _changed(self, transition: Transition | None) -> None:
        self.revision += 1
        for listener in self._listeners:
            listener(transition)


def _why_stale(text: str) -> str:
    if text.startswith(version_string.UPDATING):
        return f"an update of its weights was never finished ({text!r})"
    if version_string.parse(text) is None:
        return f"its weight version {text!r} names no published weights"
    return f"its weight version {text!r} waits for the ledger's word"
