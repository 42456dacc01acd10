"""Connections to engines: a keep-alive pool of HTTP/1.1 connections, parsed by httptools, nothing decoded.

    connection = await pool.connect("http://127.0.0.1:30000")
    connection.send(head, body)                  # bytes as they go on the wire
    reply = await connection.reply()             # status and headers, and behind them the body, see below
    while chunk := await connection.chunk(): ... # b"" at the end; reading stops while HIGH_WATER is unread
    pool.release(connection)

An event stream's `reply()` is there with its head. Of any other reply its user wants the whole body before
anything else: `reply()` waits for it too, up to `WHOLE_BYTES`, so that a reply in many pieces wakes once.
Who has no task to wait in asks to be called instead (`when_replied`), and may then take the body as it lies
in the pool's one receive buffer, where a reply that came in one piece is parsed in place:

    read ──> head parser ──> one whole reply of known length ──> the call, body by reference
                  └──────── anything else: read again by the full parser, body copied piece by piece

Requests whose order matters may be sent at once (`replies`): an engine answers those of one connection in
turn. `reply()` is then the last one; those before it are kept whole, for `earlier_reply`.

A connection carries one exchange at a time and belongs to whoever has it from the pool. `abort(error)` ends
the exchange from outside (deadline, client gone, engine given up): whoever waits gets that error, and the
engine sees its client disconnect. A connection that was not read to the end is closed by `release`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast
from urllib.parse import urlsplit

import httptools

from milepost_common import peers

HIGH_WATER = 256 * 1024
INTAKE_BYTES = 256 * 1024
"""Of the buffer that all connections of a pool read into."""
WHOLE_BYTES = 8 * 1024 * 1024
"""Replies up to this size, event streams apart, are read whole."""
KEEP_IDLE_S = 4.0
"""uvicorn closes idle connections after 5 s; ours leave earlier, so that no request meets a closing one."""

RawHeaders = list[tuple[bytes, bytes]]
_NO_BODY = (204, 304)


class UpstreamError(Exception):
    """The exchange with an engine did not end well.

    Attributes:
      connected: the connection stood when it happened.
      got_bytes: bytes of the reply had come.
    """

    def __init__(self, message: str, *, connected: bool = True, got_bytes: bool = False) -> None:
        super().__init__(message)
        self.connected, self.got_bytes = connected, got_bytes


class Refused(UpstreamError):
    """No connection could be made."""


class Died(UpstreamError):
    """The connection ended before the reply did."""


class Rubbish(UpstreamError):
    """What came is not HTTP."""


class GaveUp(UpstreamError):
    """We ended it: deadline, client gone, or engine given up."""


@dataclass(slots=True)
class Reply:
    """Head of a reply."""

    status: int
    headers: RawHeaders

    def header(self, name: bytes) -> bytes:
        """Value of a header by its lower-case name; empty when absent."""
        for key, value in self.headers:
            if key == name:
                return value
        return b""

    @property
    def streams(self) -> bool:
        """It is an event stream."""
        return self.header(b"content-type").startswith(b"text/event-stream")


class Intake:
    """The memory that connections are read into in turns: what is there is good until the next read.

    Attributes:
      memory: to read into.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Takes other memory: somebody still reads from the old one."""
        self.memory = bytearray(INTAKE_BYTES)
        self.view = memoryview(self.memory)


class Connection(asyncio.BufferedProtocol):
    """One connection to an engine; httptools calls the `on_*` methods.

    Attributes:
      origin: of the engine.
      reused: a request was sent over it before.
      idle_since: nobody uses it since then; None: somebody does.
      complete: the whole reply is there.
    """

    def __init__(self, origin: str, intake: Intake, forget: Callable[[Connection], None]) -> None:
        self.origin = origin
        self.reused = False
        self.idle_since: float | None = None
        self._intake = intake
        self._forget = forget
        self._transport: asyncio.Transport | None = None
        self._heads = SimpleNamespace(  # without on_body: the parser copies no bodies
            on_header=self.on_header,
            on_headers_complete=self.on_headers_complete,
            on_message_complete=self.on_message_complete,
        )
        self._head_parser = httptools.HttpResponseParser(self._heads)
        self._full_parser: httptools.HttpResponseParser | None = None
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._error: UpstreamError | None = None
        self._begin()

    def _begin(self) -> None:
        self._headers: RawHeaders = []
        self._reply: Reply | None = None
        self._call: Callable[[], None] | None = None
        self._chunks: deque[bytes | memoryview] = deque()
        self._unread = 0
        self._high_water = HIGH_WATER
        self._gathers = False
        self._heads_only = True
        self._awaited = 1
        self._earlier: list[tuple[int, bytes]] = []
        self.complete = False
        self._keep_alive = False
        self._got_bytes = False
        self._reading = True

    # ------------------------------------------------------------------------------------ for its user

    @property
    def open(self) -> bool:
        """Requests may be sent over it."""
        return self._error is None and self._transport is not None and not self._transport.is_closing()

    def send(self, head: bytes, body: bytes, *, replies: int = 1) -> None:
        """Writes one request, or as many as replies are awaited, and forgets the reply before it."""
        if self._error is not None or self._transport is None:
            raise self._error or Died("the connection is closed")
        self._begin()
        self._awaited = replies
        if len(body) < 65536:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    def when_replied(self, call: Callable[[], None]) -> None:
        """Calls once when `reply()` would wait no more, in place of a task that waits for it."""
        self._call = call

    @property
    def whole_reply(self) -> Reply | None:
        """The reply, where all of it is there and the exchange is well."""
        return self._reply if self.complete and self._error is None else None

    def take_body(self) -> Sequence[bytes | memoryview]:
        """What is there of the body; good until the call that `when_replied` asked for returns."""
        pieces, self._chunks = self._chunks, deque()
        return pieces

    async def reply(self) -> Reply:
        """The head of the reply, once it is there; of one that is no event stream the body is there too.

        Raises:
          UpstreamError: Died, Rubbish, or what `abort` was given.
        """
        while self._reply is None or (self._gathers and not self.complete):
            if self._error is not None:
                raise self._error
            await self._wait()
        return self._reply

    async def earlier_reply(self, index: int) -> tuple[int, bytes] | None:
        """Status and body of a reply before the last; None: the one before it ended with the connection.

        Raises:
          UpstreamError: as `reply`.
        """
        while len(self._earlier) <= index:
            if self.complete:
                return None
            if self._error is not None:
                raise self._error
            await self._wait()
        return self._earlier[index]

    async def chunk(self) -> bytes:
        """The next piece of the body, b"" at its end.

        Raises:
          UpstreamError: as `reply`.
        """
        while not self._chunks:
            if self.complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        pieces = b"".join(self._chunks) if len(self._chunks) > 1 else bytes(self._chunks[0])
        self._chunks.clear()
        self._unread = 0
        if not self._reading and self._transport is not None and not self._transport.is_closing():
            self._reading = True
            self._transport.resume_reading()
        return pieces

    async def body(self, limit: int) -> tuple[bytes, bool]:
        """The body up to about `limit` bytes, and whether that is all of it."""
        pieces: list[bytes] = []
        size = 0
        while size <= limit:
            piece = await self.chunk()
            if not piece:
                return b"".join(pieces) if len(pieces) != 1 else pieces[0], True
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces), False

    def watch_peer(self) -> None:
        """Breaks when the engine's host vanishes, whatever the deadline of the exchange is."""
        if self._transport is not None and not self._transport.is_closing():
            peers.watch_peer(self._transport.get_extra_info("socket"))

    def abort(self, error: UpstreamError) -> None:
        """Ends the exchange with `error` and closes the connection."""
        if self._error is None:
            self._error = error
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    @property
    def reusable(self) -> bool:
        """The exchange is over and the engine keeps the connection."""
        return self.complete and self._keep_alive and not self._chunks and self.open

    def rest(self) -> None:
        """Nobody uses it from now on."""
        self.idle_since = self._loop.time()

    @property
    def idle_s(self) -> float:
        """Seconds since it was used."""
        return 0.0 if self.idle_since is None else self._loop.time() - self.idle_since

    # ------------------------------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> bytearray:
        """Where to read to."""
        del sizehint
        return self._intake.memory

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came."""
        if self.idle_since is not None:
            self.abort(Rubbish("bytes came without a request"))
            return
        first, self._got_bytes = not self._got_bytes, True
        data = self._intake.view[:nbytes]
        try:
            if not (first and self._awaited == 1 and self._takes_whole(data)):
                self._take_piece(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.abort(Rubbish(f"not an HTTP reply: {error}", got_bytes=True))

    def _takes_whole(self, data: memoryview) -> bool:
        """The first bytes are one whole reply: it is told of, and stays where it is meanwhile."""
        with suppress(
            httptools.HttpParserError, httptools.HttpParserUpgrade
        ):  # the other parser says so again
            self._head_parser.feed_data(data)
        if not (self.complete and self._gathers):
            return False
        start = self._intake.memory.find(b"\r\n\r\n", 0, len(data)) + 4
        body = data[start:]
        if self._reply is None or self._reply.header(b"content-length") != b"%d" % len(body):
            return False
        self._chunks.append(body)
        self._wake()
        if self._chunks:
            self._chunks[0] = bytes(body)
        return True

    def _take_piece(self, data: memoryview) -> None:
        """Any other bytes: they are parsed from the start of the reply, and pieces of the body are kept."""
        if self._full_parser is None or self._heads_only:
            self._heads_only = False
            self._full_parser = httptools.HttpResponseParser(self)
            self._headers, self._reply, self._gathers, self.complete = [], None, False, False
            self._head_parser = httptools.HttpResponseParser(self._heads)
        self._full_parser.feed_data(data)
        if self._unread > self._high_water and self._reading and self._transport is not None:
            self._gathers, self._reading = False, False
            self._high_water = HIGH_WATER
            self._wake()
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        if self._reply is not None and not self.complete and exc is None and self._ends_with_connection():
            self.complete = True
        if self._error is None:
            why = f": {exc}" if exc else ""
            self._error = Died(f"the engine closed the connection{why}", got_bytes=self._got_bytes)
        self._wake()
        self._forget(self)

    def _ends_with_connection(self) -> bool:
        names = {name for name, _ in self._headers}
        return b"content-length" not in names and b"transfer-encoding" not in names

    # ------------------------------------------------------------------------------------ httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is there."""
        parser = self._head_parser if self._heads_only else self._full_parser
        status = cast(httptools.HttpResponseParser, parser).get_status_code()
        if status >= 200:
            self._reply = Reply(status, self._headers)
            self._gathers = not self._reply.streams
            if self._gathers:
                self._high_water = WHOLE_BYTES
            elif not self._heads_only:
                self._wake()

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._chunks.append(data)
        self._unread += len(data)
        if not self._gathers:
            self._wake()

    def on_message_complete(self) -> None:
        """The reply is over, or was an interim one (1xx)."""
        if self._reply is None:
            self._headers = []
            return
        if self._awaited > 1:
            self._awaited -= 1
            self._earlier.append((self._reply.status, b"".join(self._chunks)))
            self._headers, self._reply, self._gathers = [], None, False
            self._chunks.clear()
            self._unread = 0
            self._wake()
            return
        parser = self._head_parser if self._heads_only else self._full_parser
        self.complete = True
        self._keep_alive = cast(httptools.HttpResponseParser, parser).should_keep_alive()
        if not self._heads_only:
            self._wake()

    # ------------------------------------------------------------------------------------ within

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Pool:
    """Idle connections by origin, newest first.

    Args:
      connect_timeout_s: to make a connection.
      on_idle_close: called with the origin when an engine closes an idle connection before its time.

    Attributes:
      intake: what its connections are read into.
    """

    def __init__(
        self, *, connect_timeout_s: float = 5.0, on_idle_close: Callable[[str], None] | None = None
    ) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._on_idle_close = on_idle_close
        self._idle: dict[str, list[Connection]] = {}
        self.intake = Intake()
        self._all: set[Connection] = set()
        self._tls = ssl.create_default_context()

    async def connect(self, origin: str, *, fresh: bool = False) -> Connection:
        """An idle connection to `http://host:port`, or a new one.

        Raises:
          Refused: nobody listens there, or not within the time.
        """
        kept = None if fresh else self.idle(origin)
        return kept or await self._open(origin)

    def idle(self, origin: str) -> Connection | None:
        """An idle connection, if there is one."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            young = connection.idle_s < KEEP_IDLE_S
            connection.idle_since = None
            if connection.open and young:
                connection.reused = True
                return connection
            connection.abort(GaveUp("idle for too long"))
        return None

    async def _open(self, origin: str) -> Connection:
        url = urlsplit(origin)
        port = url.port or (443 if url.scheme == "https" else 80)
        tls = self._tls if url.scheme == "https" else None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(origin, self.intake, self._forget), url.hostname or "", port, ssl=tls
                )
        except TimeoutError:
            message = f"{origin}: no connection within {self._connect_timeout_s:g} s"
            raise Refused(message, connected=False) from None
        except OSError as error:
            raise Refused(f"{origin}: {error.strerror or error}", connected=False) from error
        connection.watch_peer()
        self._all.add(connection)
        return connection

    def release(self, connection: Connection) -> None:
        """Takes a connection back; one that cannot be used again is closed."""
        if connection.reusable:
            connection.rest()
            self._idle.setdefault(connection.origin, []).append(connection)
        else:
            connection.abort(GaveUp("not read to the end"))

    def sweep(self, origin: str) -> None:
        """Closes the connections to an engine that have been idle too long."""
        idle = self._idle.get(origin, [])
        while idle and idle[0].idle_s >= KEEP_IDLE_S:
            idle.pop(0).abort(GaveUp("idle for too long"))

    def close(self) -> None:
        """Closes every connection; exchanges under way end with an error."""
        for connection in list(self._all):
            connection.abort(GaveUp("the router is stopping"))
        self._idle.clear()

    def _forget(self, connection: Connection) -> None:
        self._all.discard(connection)
        idle = self._idle.get(connection.origin, [])
        if connection in idle:
            idle.remove(connection)
            if self._on_idle_close is not None:
                self._on_idle_close(connection.origin)
