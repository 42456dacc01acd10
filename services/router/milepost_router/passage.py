"""One request on its way through the router: its deadline, its client, and what may end it from outside.

    waiting for an engine ──> with an engine ──> answered
            │    ▲ failed, another engine │
            │    └────────────────────────┘
            └── deadline passed, client gone: `over` holds the error, whoever waits is woken

The deadline stands still while the engine that has the request is paused by us for a weight update.
"""

from __future__ import annotations

import asyncio

from milepost.errors import Cancelled, MilepostError
from milepost_common.telemetry.tracing import NOTHING
from milepost_router.headers import Request
from milepost_router.metrics import OK
from milepost_router.proxy_errors import deadline_passed
from milepost_router.record import EngineRecord
from milepost_router.signals import Waiter, wake
from milepost_router.upstream import Connection, GaveUp

_MIN_REARM_S = 0.05


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
      span: of the trace that its client records; NOTHING: none.
      outcome: how it ended, as it is counted.
      age_s: seconds since it came.
    """

    def __init__(
        self, request: Request, method: str, target: bytes, body: bytes, *, deadline_s: float
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
        self._closed = False
        self._connection: Connection | None = None
        self._deadline_s = deadline_s
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._paused_s = 0.0
        self._paused_at_start = 0.0
        self._timer = self._loop.call_later(deadline_s, self._on_timer)

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
        self.record = self._connection = None

    def travels_by(self, connection: Connection) -> None:
        """It is about to be sent over this connection; one that was cut meanwhile is not sent."""
        self._connection = connection
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
        self._timer.cancel()
        self._connection = None

    def _on_timer(self) -> None:
        remaining_s = self.remaining_s()
        if remaining_s > 0.001:
            self._timer = self._loop.call_later(max(remaining_s, _MIN_REARM_S), self._on_timer)
        else:
            self._end(deadline_passed(self._deadline_s))

    def _end(self, error: MilepostError) -> None:
        if self.over is None:
            self.over = error
        self._break()
        wake(self.waiting)

    def _break(self) -> None:
        if self._connection is not None:
            why = self.over.message if self.over is not None else self.cut
            self._connection.abort(GaveUp(why))
