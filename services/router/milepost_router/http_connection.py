"""One client connection of the HTTP side: httptools parses, ASGI calls serve, one write answers.

    bytes ──> parser ──> Exchange (scope, receive, send) ──> app      one exchange runs, pipelined ones queue
    client <── head and body in one piece <── send

It stands where uvicorn's own protocol would, and uvicorn's server binds, counts and stops it. It is here for
its cost: a head is held until the first piece of the body, so that a reply is one system call that wakes the
client once; a body that came with its head takes no wait; one idle timer lasts as long as the connection.
Header names and values of replies are taken as they are: they come from an engine's parsed reply or from our
own code.

An app may set `scope[EXCHANGE].on_hangup`, called once when the client closes its connection before the
answer is complete; a waiting `receive()` would tell the same for the price of a task a request. An app with a
method `take` is offered each request whose body came with its head before a task is made for it:

    take(exchange) -> False   a task calls the app, as ASGI has it
                   -> True    the app answers by exchange.respond(...), or goes on in a task by go_on(...)

The connection owns its parser, its exchanges and its timer; uvicorn's `server_state` owns the set of tasks.
"""

from __future__ import annotations

import asyncio
import http
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.config import Config
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

EXCHANGE = "milepost.exchange"
HIGH_WATER = 256 * 1024
"""Reading stops while so much of a request's body is not taken."""
ONE_PIECE_BYTES = 16 * 1024
"""Smaller bodies are copied behind their head; larger ones are handed to the kernel beside it."""
_BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: 32\r\n"
    b"connection: close\r\n\r\nInvalid HTTP request received.\r\n"
)
_SERVER_ERROR = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in http.HTTPStatus}
_NO_BODY = (204, 304)

Message = MutableMapping[str, Any]
log = logging.getLogger(__name__)


class HttpConnection(asyncio.Protocol):
    """A connection, as uvicorn makes it; httptools calls the `on_*` methods.

    Args:
      config: uvicorn's; its app serves.
      server_state: uvicorn's connections and tasks.
      app_state: what a lifespan left; a part of every scope.

    Attributes:
      transport: the socket's.
      writable: while the client reads more slowly than we write: done when it has caught up, or left.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._app: Any = config.loaded_app
        self._take: Callable[[Exchange], bool] | None = getattr(self._app, "take", None)
        self._state = server_state
        self._keep_alive_s = config.timeout_keep_alive
        self._loop = _loop or asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "scheme": "http",
            "root_path": "",
            "state": app_state,
        }
        self._queue: deque[Exchange] = deque()
        self._read: Exchange | None = None
        self.writable: asyncio.Future[None] | None = None
        self._idle_since = self._loop.time()
        self._closing = False

    # ------------------------------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self.transport = cast(asyncio.Transport, transport)
        self._state.connections.add(cast(Any, self))
        self._scope["server"] = get_local_addr(self.transport)
        self._scope["client"] = get_remote_addr(self.transport)
        self._timer = self._loop.call_later(self._keep_alive_s, self._on_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left, or we closed."""
        self._state.connections.discard(cast(Any, self))
        self._timer.cancel()
        self.resume_writing()
        for exchange in (*self._queue, self._read):
            if exchange is not None:
                exchange.hang_up()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            log.debug("an upgrade was asked for and is not done")
        except httptools.HttpParserError as error:
            log.warning("no HTTP request: %s", error)
            self.transport.write(_BAD_REQUEST)
            self.transport.close()
            return
        if self._queue and not self._queue[0].begun:
            self._begin(self._queue[0])

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        self.writable = self.writable or self._loop.create_future()

    def resume_writing(self) -> None:
        """It has caught up."""
        writable, self.writable = self.writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def shutdown(self) -> None:
        """uvicorn stops: closes now, or when the running exchange is answered."""
        self._closing = True
        if not self._queue:
            self.transport.close()

    def _on_timer(self) -> None:
        """One timer lasts as long as the connection: it looks whether the time without a request is over."""
        left_s = self._keep_alive_s
        if not self._queue:
            left_s -= self._loop.time() - self._idle_since
            if left_s <= 0 and self._read is None:
                self.transport.close()
                return
        self._timer = self._loop.call_later(max(left_s, 0.1), self._on_timer)

    # ------------------------------------------------------------------------------------ httptools

    def on_message_begin(self) -> None:
        """A request begins."""
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._expects = False

    def on_url(self, url: bytes) -> None:
        """Its target, or a piece of it."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self._expects = True
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is there: the app may begin."""
        keep = self._parser.should_keep_alive() and not self._closing
        exchange = Exchange(self, keep_alive=keep, expects=self._expects)
        exchange.method = self._parser.get_method()
        exchange.target = self._url if self._url.startswith(b"/") else _origin_form(self._url)
        exchange.http_version = self._parser.get_http_version()
        exchange.headers = self._headers
        self._read = exchange
        self._queue.append(exchange)
        if len(self._queue) > 1:
            self.transport.pause_reading()

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        if self._read is not None and self._read.feed(data) > HIGH_WATER:
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self._read is not None:
            self._read.feed_end()
            self._read = None

    # ------------------------------------------------------------------------------------ exchanges

    def _begin(self, exchange: Exchange) -> None:
        exchange.begun = True
        if self._take is None or not exchange.whole or not self._take(exchange):
            scope = self._scope_of(exchange)
            exchange.go_on(lambda: self._app(scope, exchange.receive, exchange.send))

    def _scope_of(self, exchange: Exchange) -> dict[str, Any]:
        raw_path, _, query = exchange.target.partition(b"?")
        path = raw_path.decode("latin-1")
        return {
            **self._scope,
            "http_version": exchange.http_version,
            "method": exchange.method.decode("ascii"),
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": exchange.headers,
            EXCHANGE: exchange,
        }

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs it in a task that uvicorn's server waits for, and cancels, when it stops."""
        task = self._loop.create_task(work)
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def answered(self, exchange: Exchange) -> None:
        """An exchange is over: the next one that waits begins, or the client may send another."""
        self._state.total_requests += 1
        self._queue.popleft()
        if not exchange.keep_alive or self._closing:
            self.transport.close()
        elif self._queue:
            self._begin(self._queue[0])
        else:
            self._idle_since = self._loop.time()
            self.transport.resume_reading()  # what is left of its request, and the next one


class Exchange:
    """One request and its reply.

    Attributes:
      method, target, http_version, headers: of the request; names of headers are in lower case.
      keep_alive: the connection stays when it is answered.
      on_hangup: what to call when the client leaves before that.
      begun: somebody answers it.
      whole: its body is there.
      unread_bytes: what is there of its body and was not taken.
    """

    method: bytes
    target: bytes
    http_version: str
    headers: list[tuple[bytes, bytes]]

    def __init__(self, connection: HttpConnection, *, keep_alive: bool, expects: bool) -> None:
        self.keep_alive = keep_alive
        self.on_hangup: Callable[[], None] | None = None
        self.begun = self.whole = False
        self._connection, self._expects = connection, expects
        self._pieces: list[bytes] = []
        self.unread_bytes = 0
        self._taken = self._gone = self._over = False
        self._heard: asyncio.Future[None] | None = None
        self._start: Message | None = None
        self._started = self._chunked = False

    def go_on(self, answer: Callable[[], Awaitable[None]]) -> None:
        """Has a task answer it; what that leaves out is answered for it."""
        self._connection.run(self._guard(answer))

    async def _guard(self, answer: Callable[[], Awaitable[None]]) -> None:
        try:
            await answer()
        except asyncio.CancelledError:
            self._connection.transport.close()
            raise
        except Exception:
            log.exception("%s %s failed", self.method.decode(), self.target.decode("latin-1"))
        if self._over or self._gone:
            return
        if self._started:
            self._connection.transport.close()  # the client must not take what it has for whole
        else:
            await self.send({"type": "http.response.start", "status": 500, "headers": _SERVER_ERROR})
            await self.send({"type": "http.response.body", "body": b"Internal Server Error"})

    # ------------------------------------------------------------------------------------ the request

    def feed(self, data: bytes) -> int:
        """A piece of the body came; returns how much of it is not taken."""
        if self._over:
            return 0
        self._pieces.append(data)
        self.unread_bytes += len(data)
        self._wake()
        return self.unread_bytes

    def feed_end(self) -> None:
        """The body is whole."""
        self.whole = True
        self._wake()

    def hang_up(self) -> None:
        """The client left."""
        if self._gone or self._over:
            return
        self._gone = True
        self._wake()
        if self.on_hangup is not None:
            self.on_hangup()

    def _wake(self) -> None:
        if self._heard is not None and not self._heard.done():
            self._heard.set_result(None)

    def take_body(self) -> bytes:
        """The whole body, once it is `whole`; `receive` has nothing more of it then."""
        self._taken = True
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    async def receive(self) -> Message:
        """ASGI's receive: what came of the body, and http.disconnect behind its end."""
        transport = self._connection.transport
        while not (self._gone or self._over or (not self._taken and (self._pieces or self.whole))):
            if self._expects and not transport.is_closing():
                transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                self._expects = False
            transport.resume_reading()
            self._heard = asyncio.get_running_loop().create_future()
            await self._heard
        if self._gone or self._over:
            return {"type": "http.disconnect"}
        body = self.take_body()
        self._pieces.clear()
        self.unread_bytes, self._taken = 0, self.whole
        return {"type": "http.request", "body": body, "more_body": not self.whole}

    # ------------------------------------------------------------------------------------ the reply

    @property
    def respondable(self) -> bool:
        """A reply may be written now: the client is there and has read what came before."""
        return not self._gone and self._connection.writable is None

    def respond(self, status: int, head: bytes, pieces: Sequence[bytes | memoryview]) -> bool:
        """Answers at once with a whole reply.

        Args:
          status: HTTP's.
          head: lines of headers, each with its end; the length of the body is among them.
          pieces: the body.

        Returns:
          False where the kernel did not take all of it: `pieces` are still read from.
        """
        connection = self._connection
        head = _status_line(status) + head + (b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        if self.method == b"HEAD":
            pieces = ()
        if len(pieces) == 1 and len(pieces[0]) < ONE_PIECE_BYTES:
            connection.transport.write(head + pieces[0])
        else:
            connection.transport.writelines((head, *pieces))
        left_bytes = connection.transport.get_write_buffer_size()
        self._over = True
        connection.answered(self)
        return not left_bytes

    async def send(self, message: Message) -> None:
        """ASGI's send."""
        connection = self._connection
        if connection.writable is not None:
            await asyncio.shield(connection.writable)
        if self._gone or self._over:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        head = b"" if self._started else self._head(more=more, size=len(body))
        if self.method == b"HEAD":
            body = b""
        elif self._chunked:
            body = _chunk(body, last=not more)
        if len(body) < ONE_PIECE_BYTES:
            connection.transport.write(head + body)
        else:
            connection.transport.writelines((head, body) if head else (body,))
        if not more:
            self._over = True
            self._wake()
            connection.answered(self)

    def _head(self, *, more: bool, size: int) -> bytes:
        """The reply's head; a length that it does not tell is that of its one piece, or left to chunks."""
        if self._start is None:
            raise RuntimeError("http.response.body came before http.response.start")
        self._started = True
        status: int = self._start["status"]
        pieces = [_status_line(status)]
        has_length = False
        for name, value in self._start.get("headers", ()):
            has_length = has_length or name == b"content-length"
            if name == b"connection" and value == b"close":
                self.keep_alive = False
            else:
                pieces += (name, b": ", value, b"\r\n")
        if not has_length and status not in _NO_BODY:
            pieces.append(self._framing(more=more, size=size))
        pieces.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        return b"".join(pieces)

    def _framing(self, *, more: bool, size: int) -> bytes:
        if not more:
            return b"content-length: %d\r\n" % size
        if self.http_version == "1.0":  # knows no chunks: the end of the connection ends the body
            self.keep_alive = False
            return b""
        self._chunked = True
        return b"transfer-encoding: chunked\r\n"


def _status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def _chunk(data: bytes, *, last: bool) -> bytes:
    piece = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
    return piece + b"0\r\n\r\n" if last else piece


def _origin_form(url: bytes) -> bytes:
    """Path and query of a target that names the host too, as proxies get it."""
    parsed = httptools.parse_url(url)
    return (parsed.path or b"/") + (b"?" + parsed.query if parsed.query else b"")
