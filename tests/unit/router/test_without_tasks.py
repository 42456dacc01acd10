"""Requests that are sent and answered in callbacks, and what makes them go on in a task."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import uvloop

from milepost_router import http_server
from raw_engine import DEADLINE_S, Exchange, Front, RawEngine, front, hang


def _request(body: bytes = b"{}", *, target: str = "/generate", more: str = "") -> bytes:
    return f"POST {target} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def _client(http_address: str, *, receive_bytes: int = 0) -> AsyncIterator[Client]:
    """A client that reads no more than it is asked for."""
    host, port = http_address.split(":")
    made = socket.socket()
    if receive_bytes:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=made, limit=1024)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _reply(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    async with asyncio.timeout(DEADLINE_S):
        head = await reader.readuntil(b"\r\n\r\n")
        [length] = [x for x in head.lower().split(b"\r\n") if x.startswith(b"content-length")]
        return head, await reader.readexactly(int(length.split(b":")[1]))


async def _warm(router: Front, *engines: RawEngine) -> None:
    """Leaves an idle connection to each engine."""
    for engine in engines:
        while not engine.got_request.is_set():
            assert (await router.ask())[0] == 200
        engine.got_request.clear()


async def test_a_request_on_its_way_holds_no_task(raw_engines: list[RawEngine]):
    a, _ = raw_engines
    async with front(a, probe_interval_s=60.0) as router:
        await _warm(router, a)
        before = asyncio.all_tasks()  # one that is about to end may be among them
        a.serve = hang
        async with _client(router.router.http_address) as (_, writer):
            writer.write(_request())
            await a.asked()
            assert router.router.fleet.known("a").in_flight == 1
            assert not asyncio.all_tasks() - before
        await router.until(lambda: router.router.fleet.known("a").in_flight == 0)


def test_a_reply_that_waits_for_its_client_is_not_written_over():
    uvloop.run(
        _read_late()
    )  # which keeps what it could not send where it is; asyncio's own transports copy it


async def _read_late() -> None:
    size, num_requests = 200_000, 64  # far more than the kernel keeps for a connection

    async def long(exchange: Exchange) -> None:
        await exchange.answer(exchange.body * (size // len(exchange.body)))

    a = RawEngine("a")
    await a.start()
    try:
        async with (
            front(a, probe_interval_s=60.0) as router,
            _client(router.router.http_address, receive_bytes=4096) as (reader, writer),
            _client(router.router.http_address) as (other_reader, other_writer),
        ):
            await _warm(router, a)
            a.serve = long
            writer.write(b"".join(_request(b"%08d" % index) for index in range(num_requests)))
            seen = same = 0
            while same < 50:  # until no more of them get through
                await asyncio.sleep(0.002)
                seen, same = len(a.exchanges), same + 1 if seen == len(a.exchanges) else 0
            assert seen < num_requests
            for _ in range(10):
                other_writer.write(_request(b"another!"))
                assert (await _reply(other_reader))[1] == b"another!" * (size // 8)
            for index in range(num_requests):
                assert (await _reply(reader))[1] == b"%08d" % index * (size // 8)
    finally:
        await a.stop()


async def test_requests_in_one_piece_are_answered_in_their_order(raw_engines: list[RawEngine]):
    a, _ = raw_engines

    async def echo(exchange: Exchange) -> None:
        await exchange.answer(exchange.body)

    async with front(a, probe_interval_s=60.0) as router:
        await _warm(router, a)
        a.serve = echo
        bodies = [b"first", b"second", b"", b"x" * 30_000, b"last"]
        async with _client(router.router.http_address) as (reader, writer):
            writer.write(b"".join(map(_request, bodies)))
            for body in bodies:
                assert (await _reply(reader))[1] == body


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", 200),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok and more", 200),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 200),
        (b"HTTP/1.1 202 Accepted\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", 202),
        (b"HTTP/1.1 409 Conflict\r\ncontent-length: 2\r\n\r\nok", 409),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 2\r\n\r\nok", 500),
        (b"not HTTP at all\r\n\r\n", 503),
    ],
)
async def test_what_an_engine_may_answer(raw_engines: list[RawEngine], raw: bytes, status: int):
    a, _ = raw_engines

    async def answer(exchange: Exchange) -> None:
        await exchange.send(raw)
        if b"close" in raw:
            exchange.writer.close()

    async with front(a, probe_interval_s=60.0, request_retries=0) as router:
        await _warm(router, a)
        a.serve = answer
        async with router.post() as reply:
            body = await reply.read()
            assert reply.status == status
            assert (body == b"ok") == (status != 503)
        assert router.router.fleet.known("a").in_flight == 0


async def test_a_reply_that_comes_byte_by_byte(raw_engines: list[RawEngine]):
    a, _ = raw_engines

    async def drip(exchange: Exchange) -> None:
        for byte in b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwhole":
            await exchange.send(bytes([byte]))
            await asyncio.sleep(0)

    async with front(a, probe_interval_s=60.0) as router:
        await _warm(router, a)
        a.serve = drip
        async with router.post() as reply:
            assert await reply.read() == b"whole"


async def test_another_engine_answers_a_request_that_was_on_its_way(raw_engines: list[RawEngine]):
    a, b = raw_engines

    async def hang_up(exchange: Exchange) -> None:
        exchange.hang_up()

    async with front(a, b, probe_interval_s=60.0) as router:
        await _warm(router, a, b)
        a.serve = hang_up
        for _ in range(4):
            status, head, content = await router.ask()
            assert (status, content["engine"], head["x-milepost-engine"]) == (200, "b", "b")
        assert all(e.in_flight == 0 for e in router.router.fleet)


async def test_a_router_that_stops_ends_what_is_on_its_way(raw_engines: list[RawEngine], monkeypatch):
    monkeypatch.setattr(http_server, "STOP_S", 1)
    a, _ = raw_engines
    left = asyncio.Event()

    async def watch(exchange: Exchange) -> None:
        await exchange.client_left()
        left.set()

    async with AsyncExitStack() as stack:
        async with front(a, probe_interval_s=60.0) as router:
            await _warm(router, a)
            a.serve = watch
            reader, writer = await stack.enter_async_context(_client(router.router.http_address))
            writer.write(_request())
            await a.asked()
        async with asyncio.timeout(DEADLINE_S):
            await left.wait()
            assert await reader.read() == b""


async def test_what_has_to_be_read_first_goes_by_a_task(raw_engines: list[RawEngine]):
    a, _ = raw_engines

    async def echo(exchange: Exchange) -> None:
        await exchange.answer(exchange.target.encode() + b" " + exchange.body)

    async with front(a, probe_interval_s=60.0) as router:
        await _warm(router, a)
        a.serve = echo
        request = _request(b"abc", target="/v1/%78?q=..", more="expect: 100-continue\r\n")
        async with _client(router.router.http_address) as (reader, writer):
            writer.write(request[:-3])
            async with asyncio.timeout(DEADLINE_S):
                assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(request[-3:])
            assert (await _reply(reader))[1] == b"/v1/%78?q=.. abc"
