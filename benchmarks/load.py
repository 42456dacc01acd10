"""A load generator: `num_connections` clients that send one request after another and compare each reply."""

from __future__ import annotations

import asyncio
from typing import cast
from urllib.parse import urlsplit

import httptools


class WrongReply(Exception):
    """A reply was not what the engine sent."""


class _Client(asyncio.Protocol):
    """One connection; sends the next request when a reply is whole."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def _next(self) -> None:
        if self._load.take():
            self._transport.write(self._load.request)
        else:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        status, body = self._parser.get_status_code(), b"".join(self._pieces)
        self._pieces.clear()
        if self._load.check(status, body):
            self._next()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.lost(exc)


class Load:
    """Requests of one kind to one server.

    Args:
      url: of the server and the path.
      body: of every request.
      expected: body of every reply.
      headers: besides those that every request needs.
    """

    def __init__(
        self, url: str, *, body: bytes, expected: bytes, headers: dict[str, str] | None = None
    ) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._expected = expected
        lines = [f"POST {parts.path} HTTP/1.1", f"host: {parts.netloc}", "content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.request = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body
        self._left = self._open = self.answered = 0
        self._wrong = ""
        self._over: asyncio.Future[None] | None = None

    async def run(self, num_requests: int, *, num_connections: int, within_s: float) -> None:
        """Sends that many requests and compares every reply.

        Raises:
          WrongReply: a reply differs, or a connection broke.
          TimeoutError: not within the deadline.
        """
        loop = asyncio.get_running_loop()
        self._left, self._open, self.answered, self._wrong = num_requests, num_connections, 0, ""
        self._over = loop.create_future()
        async with asyncio.timeout(within_s):
            for _ in range(num_connections):
                await loop.create_connection(lambda: _Client(self), self._host, self._port)
            await self._over
        if self._wrong or self.answered != num_requests:
            raise WrongReply(self._wrong or f"{self.answered} of {num_requests} requests were answered")

    def take(self) -> bool:
        """One more request may be sent."""
        self._left -= 1
        return self._left >= 0 and not self._wrong

    def check(self, status: int, body: bytes) -> bool:
        """Counts a reply that is as expected."""
        if status == 200 and body == self._expected:
            self.answered += 1
            return True
        self._wrong = self._wrong or f"HTTP {status}: {body[:200]!r}"
        return False

    def lost(self, error: Exception | None) -> None:
        """A connection is gone."""
        if error is not None:
            self._wrong = self._wrong or f"connection broke: {error}"
        self._open -= 1
        if self._open == 0 and self._over is not None and not self._over.done():
            self._over.set_result(None)
