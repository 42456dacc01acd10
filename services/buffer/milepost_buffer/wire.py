"""One connection to Redis that many calls share: each sends its commands at once, answers come in order.

    wire = await open_wire(pool, timeout_s=8.0)
    [reply] = await wire.ask([hiredis.pack_command(("GET", key))], replies=1)

redis-py opens the connection (address, TLS, password, database) and hands its transport over; from then on
bytes go straight between the transport and hiredis's reader. Next to a pool of connections this saves, for
each call, the claim and the release, a stream with its two copies, and a time-out's context: half of the
buffer's time between a request and its answer.

A wire is open until the connection breaks, until a call got no answer within `timeout_s`, or until `close`.
Then all calls that are under way fail with redis-py's ConnectionError or TimeoutError, and so does each later
one: whoever owns the wire opens another. A caller that is cancelled leaves its answer to be thrown away.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import hiredis
from redis._parsers.base import BaseParser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse
from redis.exceptions import TimeoutError as RedisTimeoutError

READ_BYTES = 256 * 1024

OnMessage = Callable[[bytes, bytes], None]


def ignore(channel: bytes, data: bytes) -> None:
    """For a wire that subscribes to nothing."""


class _Asked:
    """Commands that were sent and not answered yet."""

    __slots__ = ("answer", "deadline", "missing", "replies")

    def __init__(self, answer: asyncio.Future[list[Any]], missing: int, deadline: float) -> None:
        self.answer, self.missing, self.deadline = answer, missing, deadline
        self.replies: list[Any] = []


class Wire(asyncio.BufferedProtocol):
    """The protocol of a connection after its handshake.

    Args:
      writer: the open connection; the wire owns it from now on.
      timeout_s: longest time that a call waits for its answers.

      on_message: gets channel and data of what is published to a pattern that the wire subscribed to.

    Attributes:
      is_open: calls may be made.
      closed: set once they may not.
    """

    def __init__(self, writer: asyncio.StreamWriter, *, timeout_s: float, on_message: OnMessage) -> None:
        self._loop = asyncio.get_running_loop()
        self._writer, self._timeout_s, self._on_message = writer, timeout_s, on_message
        self._transport: Any = writer.transport
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse, replyError=cast(Any, BaseParser.parse_error)
        )
        self._space = memoryview(bytearray(READ_BYTES))
        self._asked: deque[_Asked] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.is_open, self.closed = True, asyncio.Event()
        self._transport.set_protocol(self)

    async def ask(self, parts: Sequence[bytes], *, replies: int) -> list[Any]:
        """Sends packed commands; returns their replies, errors among them as exceptions.

        Raises:
          redis.exceptions.ConnectionError, TimeoutError: the wire broke, and is closed.
        """
        if not self.is_open:
            raise RedisConnectionError("the connection was closed")
        deadline = self._loop.time() + self._timeout_s
        asked = _Asked(self._loop.create_future(), replies, deadline)
        self._asked.append(asked)
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._look_at_clock)
        if len(parts) == 1:
            self._transport.write(parts[0])
        else:
            self._transport.writelines(parts)
        return await asked.answer

    def close(self) -> None:
        """Closes the connection; calls that are under way fail."""
        self._break(RedisConnectionError("the connection was closed"))

    # ------------------------------------------------------------------ asyncio's side

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport reads into."""
        return self._space

    def buffer_updated(self, nbytes: int) -> None:
        """Hands what was read to the parser, and whole replies to their callers."""
        reader = self._reader
        try:
            reader.feed(self._space, 0, nbytes)  # type: ignore[arg-type]  # it takes any buffer
            while (reply := reader.gets()) is not False:
                self._answer(reply)
        except (InvalidResponse, IndexError) as error:
            self._break(RedisConnectionError(f"Redis answered what nobody asked, or no RESP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells everybody who waits."""
        self._break(RedisConnectionError(str(exc) if exc else "Redis closed the connection"))

    # ------------------------------------------------------------------ inside

    def _answer(self, reply: Any) -> None:
        if isinstance(reply, list) and len(reply := cast(list[Any], reply)) == 4 and reply[0] == b"pmessage":
            self._on_message(reply[2], reply[3])
            return
        asked = self._asked[0]
        asked.replies.append(reply)
        asked.missing -= 1
        if not asked.missing:
            self._asked.popleft()
            if not asked.answer.done():
                asked.answer.set_result(asked.replies)

    def _look_at_clock(self) -> None:
        self._timer = None
        if not self._asked:
            return
        if (deadline := self._asked[0].deadline) > self._loop.time():
            self._timer = self._loop.call_at(deadline, self._look_at_clock)
            return
        self._break(RedisTimeoutError(f"no answer within {self._timeout_s:g} s"))

    def _break(self, error: Exception) -> None:
        self.is_open = False
        self.closed.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._transport.abort()
        while self._asked:
            answer = self._asked.popleft().answer
            if not answer.done():
                answer.set_exception(error)


async def open_wire(pool: Any, *, timeout_s: float, on_message: OnMessage = ignore) -> Wire:
    """A wire over a new connection of a redis-py pool, after its handshake."""
    connection = pool.make_connection()
    await connection.connect()
    writer = connection._writer
    connection._reader = connection._writer = None  # it is ours now: it must not close what it does not use
    return Wire(writer, timeout_s=timeout_s, on_message=on_message)
