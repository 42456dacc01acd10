"""Connections to engines: a keep-alive pool of HTTP/1.1 connections, parsed by httptools, nothing decoded.

    connection = await pool.connect("http://127.0.0.1:30000")
    connection.send(head, body)                  # bytes as they go on the wire
    reply = await connection.reply()             # status and headers, and behind them the body, see below
    while chunk := await connection.chunk(): ... # b"" at the end; reading stops while HIGH_WATER is unread
    pool.release(connection)

An event stream's `reply()` is there with its head. Of any other reply its user wants the whole body before
anything else: `reply()` waits for it too, up to `WHOLE_BYTES`, so that a reply in many pieces wakes once.

A connection carries one exchange at a time and belongs to whoever has it from the pool. `abort(error)` ends
the exchange from outside (deadline, client gone, engine given up): whoever waits gets that error, and the
engine sees its client disconnect. A connection that was not read to the end is closed by `release`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

from milepost_common import peers

HIGH_WATER = 256 * 1024
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


class Connection(asyncio.Protocol):
    """One connection to an engine; httptools calls the `on_*` methods."""

    def __init__(self, origin: str, forget: Callable[[Connection], None]) -> None:
        self.origin = origin
        self.reused = False
        self.idle_since: float | None = None
        self._forget = forget
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._error: UpstreamError | None = None
        self._begin()

    def _begin(self) -> None:
        self._headers: RawHeaders = []
        self._reply: Reply | None = None
        self._chunks: deque[bytes] = deque()
        self._unread = 0
        self._high_water = HIGH_WATER
        self._gathers = False
        self._complete = False
        self._keep_alive = False
        self._got_bytes = False
        self._reading = True

    # ------------------------------------------------------------------------------------ for its user

    @property
    def open(self) -> bool:
        """Requests may be sent over it."""
        return self._error is None and self._transport is not None and not self._transport.is_closing()

    def send(self, head: bytes, body: bytes) -> None:
        """Writes one request and forgets the reply before it."""
        if self._error is not None or self._transport is None:
            raise self._error or Died("the connection is closed")
        self._begin()
        if len(body) < 65536:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    async def reply(self) -> Reply:
        """The head of the reply, once it is there; of one that is no event stream the body is there too.

        Raises:
          UpstreamError: Died, Rubbish, or what `abort` was given.
        """
        while self._reply is None or (self._gathers and not self._complete):
            if self._error is not None:
                raise self._error
            await self._wait()
        return self._reply

    async def chunk(self) -> bytes:
        """The next piece of the body, b"" at its end.

        Raises:
          UpstreamError: as `reply`.
        """
        while not self._chunks:
            if self._complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        pieces = b"".join(self._chunks) if len(self._chunks) > 1 else self._chunks[0]
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
        return self._complete and self._keep_alive and not self._chunks and self.open

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

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self.idle_since is not None:
            self.abort(Rubbish("bytes came without a request"))
            return
        self._got_bytes = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.abort(Rubbish(f"not an HTTP reply: {error}", got_bytes=True))
            return
        if self._unread > self._high_water and self._reading and self._transport is not None:
            self._gathers, self._reading = False, False
            self._high_water = HIGH_WATER
            self._wake()
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        if self._reply is not None and not self._complete and exc is None and self._ends_with_connection():
            self._complete = True
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
        status = self._parser.get_status_code()
        if status >= 200:
            self._reply = Reply(status, self._headers)
            self._gathers = not self._reply.streams
            if self._gathers:
                self._high_water = WHOLE_BYTES
            else:
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
        self._complete = True
        self._keep_alive = self._parser.should_keep_alive()
        self._wake()

    # ------------------------------------------------------------------------------------ within

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Pool:
    """Idle connections by origin, newest first.

    Args:
      connect_timeout_s: to make a connection.
      on_idle_close: called with the origin when an engine closes an idle connection before its time.
    """

    def __init__(
        self, *, connect_timeout_s: float = 5.0, on_idle_close: Callable[[str], None] | None = None
    ) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._on_idle_close = on_idle_close
        self._idle: dict[str, list[Connection]] = {}
        self._all: set[Connection] = set()
        self._tls = ssl.create_default_context()

    async def connect(self, origin: str, *, fresh: bool = False) -> Connection:
        """An idle connection to `http://host:port`, or a new one.

        Raises:
          Refused: nobody listens there, or not within the time.
        """
        idle = self._idle.get(origin)
        while idle and not fresh:
            connection = idle.pop()
            young = connection.idle_s < KEEP_IDLE_S
            connection.idle_since = None
            if connection.open and young:
                connection.reused = True
                return connection
            connection.abort(GaveUp("idle for too long"))
        return await self._open(origin)

    async def _open(self, origin: str) -> Connection:
        url = urlsplit(origin)
        port = url.port or (443 if url.scheme == "https" else 80)
        tls = self._tls if url.scheme == "https" else None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(origin, self._forget), url.hostname or "", port, ssl=tls
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
