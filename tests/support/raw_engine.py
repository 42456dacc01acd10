"""An engine whose every byte the test decides, and a router in front of it, in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp

from milepost_router.service import Router, running
from milepost_router.settings import EngineSettings, RouterSettings

DEADLINE_S = 30.0
Serve = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One /generate or /v1 request as an engine sees it."""

    def __init__(
        self, head: str, body: bytes, writer: asyncio.StreamWriter, reader: asyncio.StreamReader
    ) -> None:
        lines = head.split("\r\n")
        self.method, self.target, _ = lines[0].split(" ")
        self.headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        self.body = body
        self.writer, self.reader = writer, reader

    async def send(self, raw: bytes) -> None:
        self.writer.write(raw)
        await self.writer.drain()

    async def answer(self, body: bytes, *, status: str = "200 OK", kind: str = "application/json") -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
        await self.send(head.encode() + body)

    async def start_stream(self) -> None:
        await self.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def hang_up(self) -> None:
        self.writer.transport.abort()

    async def client_left(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            assert await self.reader.read(1) == b""


class RawEngine:
    """Answers probes well, and everything else as the test says."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.serve: Serve = self.say_name
        self.exchanges: list[Exchange] = []
        self.connections = 0
        self.got_request = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._tasks: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    async def say_name(self, exchange: Exchange) -> None:
        await exchange.answer(json.dumps({"engine": self.name}).encode())

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task, writer in self._tasks.items():
            task.cancel()
            writer.transport.abort()  # a task that never ran closes nothing
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._tasks[asyncio.create_task(self._on_connection(reader, writer))] = writer

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await self._one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            (int(x.split(": ")[1]) for x in head.split("\r\n") if x.startswith("content-length")), 0
        )
        body = await reader.readexactly(length)
        exchange = Exchange(head, body, writer, reader)
        if exchange.target == "/health":
            await exchange.answer(b"{}")
        elif exchange.target in ("/model_info", "/server_info"):
            await exchange.answer(b'{"weight_version": "default", "version": "0.5.21"}')
        elif not exchange.target.startswith(("/generate", "/v1/")):
            await exchange.answer(b"{}")  # what a router asks of an engine that joins
        else:
            self.exchanges.append(exchange)
            self.got_request.set()
            await self.serve(exchange)

    async def asked(self) -> Exchange:
        """The next request."""
        async with asyncio.timeout(DEADLINE_S):
            await self.got_request.wait()
        self.got_request.clear()
        return self.exchanges[-1]


class Front:
    """A router and a client of it."""

    def __init__(self, router: Router, session: aiohttp.ClientSession) -> None:
        self.router, self.session = router, session
        self.url = f"http://{router.http_address}"

    def post(self, path: str = "/generate", body: bytes = b"{}", **headers: str) -> Any:
        named = {k.replace("_", "-"): v for k, v in headers.items()}
        return self.session.post(self.url + path, data=body, headers=named)

    async def ask(self, path: str = "/generate", body: bytes = b"{}", **headers: str) -> tuple[int, Any, Any]:
        async with self.post(path, body, **headers) as reply:
            raw = await reply.read()
            return reply.status, reply.headers, json.loads(raw)

    def states(self) -> dict[str, str]:
        return {e.engine_id: e.state.name for e in self.router.fleet}

    async def until(self, check: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not check():  # noqa: ASYNC110 (what is awaited has no event of its own)
                await asyncio.sleep(0.005)


@asynccontextmanager
async def front(*engines: RawEngine, **settings: Any) -> AsyncIterator[Front]:
    """A router over engines, once all serve."""
    quick: dict[str, Any] = {
        "probe_interval_s": 0.05,
        "probe_timeout_s": 30.0,
        "connect_timeout_s": 30.0,
        "listen": "127.0.0.1:0",
        "http_listen": "127.0.0.1:0",
    }
    known = tuple(EngineSettings(id=e.name, url=e.url) for e in engines)
    async with AsyncExitStack() as stack:
        router = await stack.enter_async_context(
            running(RouterSettings(**(quick | {"buffer": "", "engines": known} | settings)))
        )
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        made = Front(router, session)
        await made.until(lambda: all(s == "SERVING" for s in made.states().values()))
        yield made


async def hang(exchange: Exchange) -> None:
    await exchange.client_left()
