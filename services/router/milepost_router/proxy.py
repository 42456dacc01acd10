"""The HTTP side: a raw ASGI app that passes /generate and /v1/* through to engines, bytes in and bytes out.

    client ──> read body ──> choose an engine ──> send ──> reply head ──> whole body ───────> client
                    ▲             │ none fits now   │ failed, nothing passed on yet  └ chunks of a stream ─┘
                    │             └ wait for fleet ─┤
                    └───────── another engine ──────┘

Most requests need no task: an engine fits, a connection to it is idle, its reply comes whole. `take` sends
them in the callback that read them, `_replied` answers in the callback that read the reply. What turns out
otherwise goes on in a task from where it stands.

Nothing is decoded; where an engine caches prefixes, a body gets a key (`prefix_key`). Everything else goes to
the control app (`/health`, `/engines`); no other engine route is reachable from here.
- A reply that is no event stream is read whole before a byte of it is passed on, so that another engine can
  repair any failure before its end. A stream that broke off ends with an `error` event.
- Requests in flight stay with an engine through an update. One that is pinned to a version is ended instead.
- When the client closes its connection we close ours, and the engine aborts. A deadline, and the fleet giving
  up an engine, do the same.

The app owns its passages; the fleet's counters are changed only here (`request_started`, `request_ended`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from milepost.errors import Cancelled, InvalidArgument, MilepostError
from milepost.types import EngineState
from milepost_common.telemetry import tracing
from milepost_router import headers, prefix_key, proxy_errors, routing, spans, targets
from milepost_router.fleet import Fleet
from milepost_router.http_connection import EXCHANGE, Exchange
from milepost_router.metrics import CLIENT_LEFT, ENGINE_ERROR, OK, REFUSED, ProxyMeter
from milepost_router.passage import Deadlines, Passage
from milepost_router.record import EngineRecord, Transition
from milepost_router.settings import RouterSettings
from milepost_router.signals import Signal, wait_for
from milepost_router.upstream import (
    WHOLE_BYTES,
    Connection,
    Died,
    Pool,
    RawHeaders,
    Refused,
    Reply,
    Rubbish,
    UpstreamError,
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)


class ServerError(UpstreamError):
    """The engine answered with HTTP 5xx."""

    def __init__(self, reply: Reply, body: bytes) -> None:
        super().__init__(f"HTTP {reply.status}: {body[:200].decode('utf-8', 'replace')}", got_bytes=True)
        self.reply, self.body = reply, body


class Looker(Protocol):
    """Looks at an engine soon."""

    def __call__(self, record: EngineRecord, /) -> None: ...


class Proxy:
    """The ASGI app.

    Args:
      fleet: the engines.
      pool: connections to them.
      changed: fires when the fleet changed.
      settings: the router's.
      control: app for every route that is not passed through.
      look_at: asks for a probe of an engine that a connection broke to.

    Attributes:
      meter: what is counted of requests.
    """

    def __init__(
        self,
        fleet: Fleet,
        pool: Pool,
        changed: Signal,
        *,
        settings: RouterSettings,
        control: App,
        look_at: Looker,
    ) -> None:
        self._fleet, self._pool, self._changed = fleet, pool, changed
        self._settings, self._control, self._look_at = settings, control, look_at
        self._passages: dict[EngineRecord, set[Passage]] = {}
        self._hosts: dict[str, bytes] = {}
        self._deadlines = Deadlines()
        self.meter = ProxyMeter()
        self._loop = asyncio.get_running_loop()
        fleet.subscribe(self._on_transition)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or not targets.is_passed(scope["path"]):
            await self._control(scope, receive, send)
            return
        try:
            request = headers.read(scope["headers"])
            body = await _read_body(receive, self._settings.max_body_bytes)
        except InvalidArgument as error:
            self.meter.refused(error)
            await _answer(send, error)
            return
        if body is None:
            return
        exchange: Exchange = scope[EXCHANGE]
        passage = self._passage_of(exchange, request, body)
        if tracing.on:
            spans.begin(passage, scope["headers"])
        await self._finish(passage, send)

    def take(self, exchange: Exchange) -> bool:
        """Sends a request to its engine if nothing has to be waited for; False: let a task call the app."""
        if tracing.on or not targets.is_passed_plainly(exchange.target):
            return False
        try:
            request = headers.read(exchange.headers)
        except InvalidArgument:
            return False
        record = routing.choose(self._fleet, request.ask, policy=self._settings.policy)
        if record is None or exchange.unread_bytes > self._settings.max_body_bytes:
            return False
        connection = self._pool.idle(record.url)
        if connection is None:
            return False
        passage = self._passage_of(exchange, request, exchange.take_body())
        passage.exchange = exchange
        self._give(passage, record)
        passage.travels_by(connection)
        connection.send(*self._request_to(record, passage))
        connection.when_replied(partial(self._replied, passage, record, connection))
        return True

    def _replied(self, passage: Passage, record: EngineRecord, connection: Connection) -> None:
        """The reply to a request that was taken is whole, or something else came of it."""
        exchange = cast(Exchange, passage.exchange)
        reply = connection.whole_reply
        if reply is None or reply.status >= 400 or reply.streams or not exchange.respondable:
            exchange.go_on(lambda: self._finish(passage, exchange.send, sent=connection))
            return
        pieces = connection.take_body()
        version, length = (passage.version_start, record.version), sum(map(len, pieces))
        head = headers.whole_reply_head(
            reply.headers, engine_id=record.engine_id, version=version, length=length
        )
        passage.head_sent = True
        if not exchange.respond(reply.status, head, pieces):
            self._pool.intake.renew()
        self._take_back(passage, record, failed=False)
        self._pool.release(connection)
        self._over(passage)

    def _passage_of(self, exchange: Exchange, request: headers.Request, body: bytes) -> Passage:
        passage = Passage(
            request,
            exchange.method,
            exchange.target,
            body,
            deadline_s=request.deadline_s or self._settings.request_timeout_s,
            deadlines=self._deadlines,
        )
        self.meter.in_flight += 1
        exchange.on_hangup = passage.client_left
        return passage

    async def _finish(self, passage: Passage, send: Send, *, sent: Connection | None = None) -> None:
        """Serves a passage to its end; one that was taken is on its way by `sent`."""
        try:
            await self._serve(passage, send, sent)
        finally:
            if passage.span is not tracing.NOTHING:
                spans.end(passage)
            self._over(passage)

    def _over(self, passage: Passage) -> None:
        self.meter.ended(passage.outcome, passage.age_s)
        passage.close()

    # ------------------------------------------------------------------------------------ one request

    async def _serve(self, passage: Passage, send: Send, sent: Connection | None) -> None:
        """Gives the request to one engine after another until one answers, and tells the client otherwise."""
        try:
            await self._try_engines(passage, send, sent)
        except Cancelled:
            passage.outcome = CLIENT_LEFT
            log.debug("%s: the client left", passage.request.ask.describe())
        except MilepostError as error:
            passage.outcome = error.reason.lower()
            if not passage.head_sent:
                await _answer(send, error)
            elif passage.streams_events:
                await send({"type": "http.response.body", "body": proxy_errors.sse_event(error)})
            else:  # an end without the last chunk: the client must not take it for whole
                log.warning("a reply broke off: %s", error)

    async def _try_engines(self, passage: Passage, send: Send, sent: Connection | None) -> None:
        tried: list[EngineRecord] = []
        failures: list[UpstreamError] = []
        while len(failures) <= self._settings.request_retries:
            record = passage.record or await self._engine_for(passage, tried)
            if record is None:
                break
            try:
                await self._with_engine(passage, record, send, sent)
                return
            except UpstreamError as error:
                if passage.over is not None:
                    raise passage.over from error
                if passage.head_sent:
                    raise proxy_errors.stream_broke(f"{record.engine_id}: {error}") from error
                sent = None
                tried.append(record)
                failures.append(error)
                self.meter.retried(error)
                log.info("%s: attempt %d failed: %s", record.engine_id, len(tried), error)
        await self._give_up(passage, tried, failures, send)

    async def _give_up(
        self, passage: Passage, tried: list[EngineRecord], failures: list[UpstreamError], send: Send
    ) -> None:
        """Passes on what the last engine said, or says what went wrong."""
        last = failures[-1]
        if not isinstance(last, ServerError):
            told = [f"{record.engine_id}: {why}" for record, why in zip(tried, failures, strict=True)]
            raise proxy_errors.engines_failed(told) from last
        passage.outcome = ENGINE_ERROR
        await send(_start(last.reply.status, headers.with_length(_kept(last.reply.headers), len(last.body))))
        await send({"type": "http.response.body", "body": last.body})

    async def _engine_for(self, passage: Passage, tried: list[EngineRecord]) -> EngineRecord | None:
        """An engine that fits, maybe after a wait for one on its way; None: all that fit were tried."""
        ask = passage.request.ask
        give_up_at = self._loop.time() + self._settings.admit_wait_s
        while True:
            if passage.over is not None:
                raise passage.over
            record = routing.choose(self._fleet, ask, tried=tried, policy=self._settings.policy)
            if record is not None:
                return record
            left_s = give_up_at - self._loop.time()
            if passage.pin_lost:
                raise proxy_errors.pinned_version_gone(ask.version)
            if left_s <= 0 or not routing.may_come([e for e in self._fleet if e not in tried], ask):
                if tried:
                    return None
                raise proxy_errors.no_engine_fits(ask.describe(), routing.describe_fleet(self._fleet, ask))
            await self._wait_for_fleet(passage, left_s)

    async def _wait_for_fleet(self, passage: Passage, left_s: float) -> None:
        """Waits until the fleet changes, or something ends the request."""
        passage.waiting = self._changed.waiter()
        began_s = passage.age_s
        self.meter.queued += 1
        try:
            await wait_for(passage.waiting, left_s)
        finally:
            self.meter.queued -= 1
            self.meter.waited(passage.age_s - began_s)
        passage.waiting = None

    async def _with_engine(
        self, passage: Passage, record: EngineRecord, send: Send, sent: Connection | None
    ) -> None:
        """One attempt: the request travels to an engine and its reply to the client."""
        failed = False
        if sent is None:
            self._give(passage, record)
        try:
            await self._exchange(passage, record, send, sent)
        except (Refused, Died, Rubbish) as error:
            failed = True
            self._broken(record, error)
            raise
        except ServerError:
            failed = True
            raise
        finally:
            self._take_back(passage, record, failed=failed)

    def _give(self, passage: Passage, record: EngineRecord) -> None:
        self._fleet.request_started(record)
        passage.given_to(record)
        self._passages.setdefault(record, set()).add(passage)

    def _take_back(self, passage: Passage, record: EngineRecord, *, failed: bool) -> None:
        passages = self._passages[record]
        passages.discard(passage)
        if not passages and record.leaving:
            del self._passages[record]
        now = self._loop.time()
        if not failed and passage.head_sent and passage.outcome is OK and targets.generates(passage.target):
            self._fleet.generated(record, now)
        self._fleet.request_ended(record, failed=failed, now=now)
        passage.taken_back()

    def _request_to(self, record: EngineRecord, passage: Passage) -> tuple[bytes, bytes]:
        """Head and body of a request to an engine."""
        host = self._hosts.get(record.url)
        if host is None:
            host = self._hosts[record.url] = urlsplit(record.url).netloc.encode()
        body = prefix_key.body_for(record, passage.target, passage.body)
        passed = passage.request.passed
        return headers.request_head(passage.method, passage.target, host, passed, len(body)), body

    async def _exchange(
        self, passage: Passage, record: EngineRecord, send: Send, sent: Connection | None
    ) -> None:
        """Sends it, again once where a kept connection turned out to be closed, and passes the reply on."""
        for fresh in (False, True):
            connection = sent or await self._pool.connect(record.url, fresh=fresh)
            try:
                if sent is None:
                    passage.travels_by(connection)
                    connection.send(*self._request_to(record, passage))
                reply = await connection.reply()
                await self._pass_on(passage, record, connection, reply, send)
                return
            except Died as error:
                if fresh or not connection.reused or error.got_bytes or record.suspect:
                    raise
                sent = None
            finally:
                self._pool.release(connection)

    async def _pass_on(
        self, passage: Passage, record: EngineRecord, connection: Connection, reply: Reply, send: Send
    ) -> None:
        if reply.streams and reply.status < 500:
            await self._pass_stream(passage, record, connection, reply, send, ends_with_comment=True)
            return
        body, whole = await connection.body(WHOLE_BYTES)
        if reply.status >= 500:
            raise ServerError(reply, body)
        if reply.status >= 400:
            passage.outcome = REFUSED
        if not whole:
            await self._pass_stream(passage, record, connection, reply, send, first=body)
            return
        head = self._reply_head(passage, record, reply, end=record.version, length=len(body))
        passage.head_sent = True
        await send(_start(reply.status, head))
        await send({"type": "http.response.body", "body": body})

    async def _pass_stream(
        self,
        passage: Passage,
        record: EngineRecord,
        connection: Connection,
        reply: Reply,
        send: Send,
        *,
        first: bytes = b"",
        ends_with_comment: bool = False,
    ) -> None:
        """Passes chunks on as they come; nothing of the reply is sent before its first chunk is there."""
        chunk = first or await connection.chunk()
        head = self._reply_head(passage, record, reply, end=None)
        passage.head_sent, passage.streams_events = True, ends_with_comment
        await send(_start(reply.status, head))
        generates = ends_with_comment and reply.status < 400 and targets.generates(passage.target)
        while chunk:
            if generates:
                self._fleet.generated(record, self._loop.time())
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            chunk = await connection.chunk()
        last = headers.end_of_stream(record.version) if ends_with_comment else b""
        await send({"type": "http.response.body", "body": last})

    def _reply_head(
        self,
        passage: Passage,
        record: EngineRecord,
        reply: Reply,
        *,
        end: int | None,
        length: int | None = None,
    ) -> RawHeaders:
        return headers.reply_headers(
            reply.headers,
            engine_id=record.engine_id,
            start=passage.version_start,
            end=end,
            length=length,
        )

    # ------------------------------------------------------------------------------------ the fleet

    def _broken(self, record: EngineRecord, error: UpstreamError) -> None:
        """A connection to an engine broke: nobody is sent there until a probe has looked."""
        if not isinstance(error, Rubbish):
            self._fleet.suspected(record)
        self._look_at(record)

    def _on_transition(self, transition: Transition | None) -> None:
        """Takes requests from engines that were given up or that get other weights."""
        if transition is not None:
            record, after = transition.engine, transition.after
            if after in (EngineState.DEAD, EngineState.QUARANTINED) or transition.withdrawn:
                self.take_from(record, f"engine {record.engine_id} was given up: {record.detail}")
            elif after is EngineState.UPDATING:
                self._take_pinned(record)
            elif transition.before is EngineState.UPDATING and after is EngineState.STALE:
                self._take_later(record)
        self._changed.fire()

    def take_from(self, record: EngineRecord, why: str) -> None:
        """Takes every request from an engine; those without a byte passed on go to another one."""
        for passage in list(self._passages.get(record, ())):
            passage.take_away(why)

    def _take_pinned(self, record: EngineRecord) -> None:
        for passage in list(self._passages.get(record, ())):
            if passage.request.ask.version:
                passage.pin_lost = True
                passage.take_away(f"engine {record.engine_id} is given other weights")

    def _take_later(self, record: EngineRecord) -> None:
        """Its requests were aborted and hand over what they have; those that do not in time are taken."""
        started_before = list(self._passages.get(record, ()))
        why = f"engine {record.engine_id}: {record.detail}"

        def take() -> None:
            for passage in started_before:
                if passage in self._passages.get(record, ()):
                    passage.take_away(why)

        self._loop.call_later(self._settings.abort_grace_s, take)

    @property
    def in_flight(self) -> int:
        """Requests that are with an engine."""
        return sum(len(passages) for passages in self._passages.values())


async def _read_body(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None where the client left before it was sent.

    Raises:
      InvalidArgument: it is larger than the limit.
    """
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        piece: bytes = message.get("body", b"")
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise InvalidArgument(f"the body is larger than {limit} bytes; raise [router] max_body_bytes")
        if not message.get("more_body", False):
            return piece if len(pieces) == 1 else b"".join(pieces)


async def _answer(send: Send, error: MilepostError) -> None:
    status, head, body = proxy_errors.render(error)
    await send(_start(status, head))
    await send({"type": "http.response.body", "body": body})


def _start(status: int, head: RawHeaders) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": head}


def _kept(upstream: RawHeaders) -> RawHeaders:
    return [(k, v) for k, v in upstream if k in (b"content-type", b"retry-after")]
