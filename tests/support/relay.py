"""A TCP relay between a client and a server: it can keep answers to itself, and cut connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

CHUNK_BYTES = 1 << 16
END_S = 30.0


class Relay:
    """Forwards connections; requests always arrive.

    Args:
      target: `host:port` of the server.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._host, self._port = host, int(port)
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""
        self.muted = False
        """What the server says is read and thrown away, of the connections that there are."""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Relay]:
        """Listens on a free port of this machine."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        try:
            yield self
        finally:
            server.close()
            self.cut()
            for task in self._tasks:
                task.cancel()  # one that still connects has nothing yet that `cut` could reset
            async with asyncio.timeout(END_S):
                await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Resets every connection; new ones are forwarded, and answered."""
        self.muted = False
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        ends = {writer}
        try:
            ahead, back = await asyncio.open_connection(self._host, self._port)
            ends.add(back)
            self._open |= ends
            async with asyncio.TaskGroup() as both:
                both.create_task(self._copy(reader, back, answers=False))
                both.create_task(self._copy(ahead, writer, answers=True))
        finally:
            self._open -= ends
            for end in ends:
                end.transport.abort()
            self._tasks.discard(task)

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                if not (answers and self.muted):
                    sink.write(data)
                    await sink.drain()
        sink.close()
