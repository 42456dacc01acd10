"""What the router tells: the fleet as it is, requests that passed through, weight transactions.

    Fleet --looked at--> states, versions, lag     Proxy: requests, waits, retries     Transactions: phases

A request costs two look-ups and a histogram's slot here, a third of a microsecond of the 37 that the router
has for it. Labels are engines, runs and outcomes, never sessions or requests.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator

from milepost.errors import MilepostError
from milepost.types import EngineState
from milepost_common.metrics import Counter, Histogram, Instrument, Kind, Spec, Watched
from milepost_router.fleet import Fleet
from milepost_router.record import Transition

ENGINE_STATE = Spec(
    "milepost_engine_state",
    Kind.GAUGE,
    "1 for the state that an engine is in, 0 for the others",
    labels=("engine", "state"),
    when_bad="quarantined, dead or stale for more than a step: `milepost engines` says why in words",
)
ENGINES = Spec("milepost_engines", Kind.GAUGE, "engines by state", labels=("state",), unit="engine")
ENGINE_VERSION = Spec(
    "milepost_engine_weight_version",
    Kind.GAUGE,
    "weight version that an engine serves; 0: none",
    labels=("engine", "run"),
    unit="version",
)
ENGINE_LAG = Spec(
    "milepost_engine_label_lag",
    Kind.GAUGE,
    "steps by which an engine's weights are behind the newest of its run in the fleet",
    labels=("engine", "run"),
    unit="step",
    when_bad="above 0 for long: the engine misses publications; its samples are stale at birth",
)
ENGINE_IN_FLIGHT = Spec(
    "milepost_engine_in_flight", Kind.GAUGE, "requests with an engine", labels=("engine",), unit="request"
)
ENGINE_REQUESTS = Spec(
    "milepost_engine_requests",
    Kind.COUNTER,
    "requests given to an engine",
    labels=("engine",),
    unit="request",
)
ENGINE_FAILURES = Spec(
    "milepost_engine_failures",
    Kind.COUNTER,
    "requests that failed by an engine's fault",
    labels=("engine",),
    unit="request",
    when_bad="one engine alone: look at its log; all of them: a prompt or a setting that they do not take",
)
ENGINE_PAUSED = Spec(
    "milepost_engine_paused_seconds",
    Kind.COUNTER,
    "seconds that an engine was paused for weight updates",
    labels=("engine",),
    unit="s",
    when_bad="a large share of time: publish less often (publish_every), or by a faster transport",
)
TRANSITIONS = Spec(
    "milepost_engine_transitions",
    Kind.COUNTER,
    "times that engines came into a state",
    labels=("state",),
    unit="transition",
    when_bad="quarantined and dead should stand still",
)
REQUESTS = Spec(
    "milepost_proxy_requests",
    Kind.COUNTER,
    "requests by how they ended: ok, refused (the engine answered 4xx), engine_error (5xx), client_left, or "
    "the reason of the router's own error",
    labels=("outcome",),
    unit="request",
    when_bad="no_engine_fits: see the engines' states; deadline_exceeded: too much in flight",
)
REQUEST_SECONDS = Spec(
    "milepost_proxy_request_seconds",
    Kind.HISTOGRAM,
    "time of requests, from their body to the end of the reply",
    unit="s",
)
IN_FLIGHT = Spec("milepost_proxy_in_flight", Kind.GAUGE, "requests in the router", unit="request")
QUEUED = Spec(
    "milepost_proxy_queued",
    Kind.GAUGE,
    "requests that wait for an engine",
    unit="request",
    when_bad="more than a moment: every engine is joining, being updated or suspect",
)
QUEUED_SECONDS = Spec(
    "milepost_proxy_queued_seconds",
    Kind.COUNTER,
    "seconds that requests waited for an engine, summed",
    unit="s",
)
RETRIES = Spec(
    "milepost_proxy_retries",
    Kind.COUNTER,
    "attempts that failed, by kind of failure; another engine was asked if there was one",
    labels=("kind",),
    unit="attempt",
    when_bad="refused, died: engines crash; servererror: they answer 5xx",
)
TRANSACTIONS = Spec(
    "milepost_transactions",
    Kind.COUNTER,
    "weight transactions by outcome",
    labels=("outcome",),
    unit="transaction",
    when_bad="aborted: the router's log says why; the trainer tries again by itself",
)
TRANSACTION_SECONDS = Spec(
    "milepost_transaction_seconds",
    Kind.HISTOGRAM,
    "time of a transaction's phases: prepare (to the first bucket), pause (engines are marked), transfer (to "
    "the commit), verify, commit (until engines serve), publish (what the ledger takes longer than they)",
    labels=("phase",),
    unit="s",
    when_bad="prepare: engines join the group slowly; transfer: the transport, or the trainer's gathering; "
    "verify: checksums (verify_checksum); pause, commit: an engine's admin calls (where they travel with an "
    "order, the pause is in transfer); publish: the ledger's disk",
)
TRANSACTION_BYTES = Spec(
    "milepost_transaction_bytes",
    Kind.COUNTER,
    "bytes of weights that were transferred, each bucket once however many engines took it",
    unit="By",
)
SPECS = (
    ENGINE_STATE, ENGINES, ENGINE_VERSION, ENGINE_LAG, ENGINE_IN_FLIGHT, ENGINE_REQUESTS, ENGINE_FAILURES,
    ENGINE_PAUSED, TRANSITIONS, REQUESTS, REQUEST_SECONDS, IN_FLIGHT, QUEUED, QUEUED_SECONDS, RETRIES,
    TRANSACTIONS, TRANSACTION_SECONDS, TRANSACTION_BYTES,
)  # fmt: skip

OK, CLIENT_LEFT, REFUSED, ENGINE_ERROR = "ok", "client_left", "refused", "engine_error"
STATES = tuple(s for s in EngineState if s is not EngineState.UNSPECIFIED)
PHASES = ("prepare", "pause", "transfer", "verify", "commit", "publish")
KINDS_OF_FAILURE = ("refused", "died", "rubbish", "gaveup", "servererror")
"""Errors of `milepost_router.upstream` and of the proxy, in lower case."""

Look = Iterator[tuple[tuple[str, ...], float]]


class FleetView:
    """The fleet, looked at; and its transitions, counted."""

    def __init__(self, fleet: Fleet, *, clock: Callable[[], float]) -> None:
        self._fleet, self._clock = fleet, clock
        self._transitions = Counter(TRANSITIONS)
        for state in STATES:
            self._transitions.cell(_name(state))
        fleet.subscribe(self._count)

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """What it tells."""
        return (
            self._transitions,
            Watched(ENGINE_STATE, self._states),
            Watched(ENGINES, self._by_state),
            Watched(ENGINE_VERSION, lambda: (((e.engine_id, e.run_id), e.version) for e in self._fleet)),
            Watched(ENGINE_LAG, self._lags),
            Watched(ENGINE_IN_FLIGHT, lambda: (((e.engine_id,), e.in_flight) for e in self._fleet)),
            Watched(ENGINE_REQUESTS, lambda: (((e.engine_id,), e.requests_total) for e in self._fleet)),
            Watched(ENGINE_FAILURES, lambda: (((e.engine_id,), e.failures_total) for e in self._fleet)),
            Watched(
                ENGINE_PAUSED, lambda: (((e.engine_id,), e.paused_s(self._clock())) for e in self._fleet)
            ),
        )

    def _count(self, transition: Transition | None) -> None:
        if transition is not None and transition.after is not transition.before:
            self._transitions.add(_name(transition.after))

    def _states(self) -> Look:
        for engine in self._fleet:
            yield from (((engine.engine_id, _name(s)), float(engine.state is s)) for s in STATES)

    def _by_state(self) -> Look:
        tally = Tally(engine.state for engine in self._fleet)
        yield from (((_name(state),), tally[state]) for state in STATES)

    def _lags(self) -> Look:
        """Of engines that serve versioned weights; others have no label to lag."""
        newest: dict[str, int] = {}
        serving = [e for e in self._fleet if e.version]
        for engine in serving:
            newest[engine.run_id] = max(newest.get(engine.run_id, 0), engine.label)
        yield from (((e.engine_id, e.run_id), newest[e.run_id] - e.label) for e in serving)


def _name(state: EngineState) -> str:
    return state.name.lower()


class ProxyMeter:
    """Counts requests; written by the proxy alone.

    Attributes:
      in_flight: requests in the router.
      queued: those that wait for an engine.
    """

    def __init__(self) -> None:
        self.in_flight = self.queued = 0
        self._requests, self._seconds = Counter(REQUESTS), Histogram(REQUEST_SECONDS)
        self._queued_seconds, self._retries = Counter(QUEUED_SECONDS), Counter(RETRIES)
        self._ok, self._series = self._requests.cell(OK), self._seconds.series()
        for kind in KINDS_OF_FAILURE:
            self._retries.cell(kind)

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """What it tells."""
        return (
            self._requests,
            self._seconds,
            self._queued_seconds,
            self._retries,
            Watched(IN_FLIGHT, lambda: [((), self.in_flight)]),
            Watched(QUEUED, lambda: [((), self.queued)]),
        )

    def ended(self, outcome: str, seconds: float) -> None:
        """A request is over."""
        self.in_flight -= 1
        self._series.record(seconds)
        if outcome is OK:
            self._ok.value += 1
        else:
            self._requests.add(outcome)

    def refused(self, error: MilepostError) -> None:
        """A request was refused before it began."""
        self._requests.add(error.reason.lower())

    def waited(self, seconds: float) -> None:
        """A request waited for an engine."""
        self._queued_seconds.add(amount=seconds)

    def retried(self, error: Exception) -> None:
        """An attempt failed."""
        self._retries.add(type(error).__name__.lower())


class TransactionMeter:
    """Counts transactions of all runs."""

    def __init__(self) -> None:
        self.outcomes, self.seconds = Counter(TRANSACTIONS), Histogram(TRANSACTION_SECONDS)
        self.size_bytes = Counter(TRANSACTION_BYTES)
        for outcome in ("committed", "aborted"):
            self.outcomes.cell(outcome)
        for phase in PHASES:
            self.seconds.series(phase)

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """What it tells."""
        return self.outcomes, self.seconds, self.size_bytes

    def begin(self) -> TransactionClock:
        """A transaction was prepared."""
        return TransactionClock(self)


class TransactionClock:
    """Times the phases of one transaction, which follow one another in the order of `PHASES`."""

    def __init__(self, meter: TransactionMeter, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._meter, self._clock = meter, clock
        self._phase, self._since = PHASES[0], clock()
        self._ended = False
        self._spent: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """The next phase begins."""
        self._record()
        self._phase = phase

    def took(self, size_bytes: int) -> None:
        """A bucket was given to the members."""
        self._meter.size_bytes.add(amount=size_bytes)

    def end(self, outcome: str) -> None:
        """It is over: the phase that it was in counts only where it came to its end."""
        if not self._ended:
            self._ended = True
            self._meter.outcomes.add(outcome)
            if outcome == "committed":
                self._record()

    def _record(self) -> None:
        now = self._clock()
        self._meter.seconds.record(now - self._since, self._phase)
        self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._since
        self._since = now

    def in_words(self) -> str:
        """Its phases so far, for the log."""
        return ", ".join(f"{phase} {1000 * spent:.1f} ms" for phase, spent in self._spent.items())
