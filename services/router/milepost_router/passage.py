"""One request on its way through the router: its deadline, its client, and what may end it from outside.

    waiting for an engine ──> with an engine ──> answered
            │    ▲ failed, another engine │
            │    └────────────────────────┘
            └── deadline passed, client gone: `over` holds the error, whoever waits is woken

The deadline stands still while the engine that has the request is paused by us for a weight update. One timer
serves all requests of a router: it goes off at the earliest deadline, and looks at each.
"""

from __future__ import annotations

import asyncio
import math

from milepost.errors import Cancelled, MilepostError
from milepost_common.telemetry.tracing import NOTHING
from milepost_router.headers import Request
from milepost_router.http_connection import Exchange
from milepost_router.metrics import OK
from milepost_router.proxy_errors import deadline_passed
from milepost_router.record import EngineRecord
from milepost_router.signals import Waiter, wake
from milepost_router.upstream import Connection, GaveUp

_MIN_REARM_S = 0.05


class Deadlines:
    """Ends requests at their deadlines: exactly, or `_MIN_REARM_S` late where many follow one another."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._passages: set[Passage] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._goes_off_at = math.inf

    def add(self, passage: Passage, due_at: float) -> None:
        """A request came."""
        self._passages.add(passage)
        if due_at < self._goes_off_at:
            self._set(due_at)

    def discard(self, passage: Passage) -> None:
        """It is answered."""
        self._passages.discard(passage)

    def _set(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._goes_off_at = at
        self._timer = self._loop.call_at(at, self._look)

    def _look(self) -> None:
        self._timer, self._goes_off_at = None, math.inf
        soonest_s = math.inf
        for passage in list(self._passages):
            remaining_s = passage.remaining_s()
            if remaining_s > 0.001:
                soonest_s = min(soonest_s, remaining_s)
            else:
                self._passages.discard(passage)
                passage.expire()
        if soonest_s < math.inf:
            self._set(self._loop.time() + max(soonest_s, _MIN_REARM_S))


class Passage:
    """State of one request.

    Attributes:
      request: its headers, sorted.
      method, target, body: as they came.
      record: the engine that has it now.
      over: why it ended before its time, for the client.
      cut: why it was taken from the engine that has it now.
      pin_lost: the engine of a request for exactly one version was given other weights.
      head_sent: the client has the head of a reply: no other engine can answer any more.
      streams_events: what it gets is an event stream.
      exchange: its reply's way to the client; None: a task holds that.
      connection: to the engine, once it travels.
      span: of the trace that its client records; NOTHING: none.
      outcome: how it ended, as it is counted.
      age_s: seconds since it came.
    """

    __slots__ = (
        "_closed", "_deadline_s", "_deadlines", "_loop", "_paused_at_start", "_paused_s", "_started", "body",
        "connection", "cut", "exchange", "head_sent", "method", "outcome", "over", "pin_lost", "record",
        "request", "span", "streams_events", "target", "version_start", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        method: bytes,
        target: bytes,
        body: bytes,
        *,
        deadline_s: float,
        deadlines: Deadlines,
    ) -> None:
        self.request = request
        self.method, self.target, self.body = method, target, body
        self.record: EngineRecord | None = None
        self.over: MilepostError | None = None
        self.cut: str = ""
        self.pin_lost = False
        self.head_sent = False
        self.streams_events = False
        self.version_start = 0
        self.span = NOTHING
        self.outcome = OK
        self.waiting: Waiter | None = None
        self.exchange: Exchange | None = None
        self.connection: Connection | None = None
        self._closed = False
        self._deadline_s, self._deadlines = deadline_s, deadlines
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._paused_s = 0.0
        self._paused_at_start = 0.0
        deadlines.add(self, self._started + deadline_s)

    def given_to(self, record: EngineRecord) -> None:
        """An engine has it now."""
        self.record, self.cut = record, ""
        self.version_start = record.version
        if self.span is not NOTHING:
            self.span.set(engine_id=record.engine_id, version=record.version, label=record.label)
        self._paused_at_start = record.paused_s(self._loop.time())

    def taken_back(self) -> None:
        """The engine has it no more."""
        if self.record is not None:
            self._paused_s += self.record.paused_s(self._loop.time()) - self._paused_at_start
        self.record = self.connection = None

    def travels_by(self, connection: Connection) -> None:
        """It is about to be sent over this connection; one that was cut meanwhile is not sent."""
        self.connection = connection
        if self.over is not None or self.cut:
            self._break()

    def remaining_s(self) -> float:
        """Seconds until the deadline."""
        now = self._loop.time()
        paused_s = self._paused_s
        if self.record is not None:
            paused_s += self.record.paused_s(now) - self._paused_at_start
        return self._deadline_s - (now - self._started) + paused_s

    @property
    def age_s(self) -> float:
        """Seconds since it came."""
        return self._loop.time() - self._started

    def client_left(self) -> None:
        """The client closed its connection."""
        if not self._closed:
            self._end(Cancelled("the client closed the connection"))

    def take_away(self, why: str) -> None:
        """Takes it from its engine; another one may have it if no byte of a reply was passed on."""
        self.cut = why
        self._break()

    def close(self) -> None:
        """It is answered: nothing can end it any more."""
        self._closed = True
        self._deadlines.discard(self)
        self.connection = None

    def expire(self) -> None:
        """Its deadline passed."""
        self._end(deadline_passed(self._deadline_s))

    def _end(self, error: MilepostError) -> None:
        if self.over is None:
            self.over = error
        self._break()
        wake(self.waiting)

    def _break(self) -> None:
        if self.connection is not None:
            why = self.over.message if self.over is not None else self.cut
            self.connection.abort(GaveUp(why))
