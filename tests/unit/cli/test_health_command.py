"""`milepost health` against a real server: its health, of one service and of all, and what is not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from launched import free_port as port_of_nobody
from milepost.cli import main as cli
from milepost.cli.health import check, check_url
from milepost.errors import InvalidArgument, NotFound, Unavailable
from milepost_common.server import GrpcServer

PATIENCE_S = 30.0
PATIENTLY = ["--timeout-s", "30"]


def nothing_to_add(servicer: object, server: object) -> None:
    """A service without methods: health and reflection alone are served."""


@pytest.fixture
async def server() -> AsyncIterator[GrpcServer]:
    async with GrpcServer(listen="127.0.0.1:0", grace_s=0.1) as server:
        server.add(nothing_to_add, None, "milepost.v1.BufferService")
        await server.start()
        yield server


@pytest.fixture
def free_port() -> int:
    return int(port_of_nobody())


async def test_a_server_and_its_service_serve(server: GrpcServer) -> None:
    await check(server.address, timeout_s=PATIENCE_S)
    await check(server.address, service="milepost.v1.BufferService", timeout_s=PATIENCE_S)


async def test_a_service_that_is_not_there_is_named(server: GrpcServer) -> None:
    with pytest.raises(NotFound):
        await check(server.address, service="milepost.v1.Nonsense", timeout_s=PATIENCE_S)


async def test_a_server_that_stops_does_not_serve(server: GrpcServer) -> None:
    await server._health.enter_graceful_shutdown()
    with pytest.raises(Unavailable, match="does not serve"):
        await check(server.address, timeout_s=PATIENCE_S)


async def test_the_command_ends_with_0_where_it_serves(
    server: GrpcServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await asyncio.to_thread(cli.main, ["health", server.address, *PATIENTLY]) == cli.OK
    assert "serves" in capsys.readouterr().out


async def test_who_speaks_no_http_does_not_serve() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"220 mail.example ESMTP\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable, match="answers no HTTP"):
            await asyncio.to_thread(check_url, f"http://127.0.0.1:{port}/health", timeout_s=PATIENCE_S)


async def test_who_waits_for_a_server_finds_it_once_it_listens(free_port: int) -> None:
    asking = asyncio.create_task(check(f"127.0.0.1:{free_port}", timeout_s=PATIENCE_S, wait_for_ready=True))
    with pytest.raises(Unavailable):
        await check(f"127.0.0.1:{free_port}", timeout_s=PATIENCE_S)
    assert not asking.done()
    async with GrpcServer(listen=f"127.0.0.1:{free_port}", grace_s=0.1) as server:
        await server.start()
        await asking


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "http://127.0.0.1:{}/health"])
def test_the_command_ends_with_1_where_nobody_listens(
    form: str, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["health", form.format(free_port), *PATIENTLY]) == cli.FAILED
    assert str(free_port) in capsys.readouterr().err


async def test_an_http_address_is_asked_by_get(capsys: pytest.CaptureFixture[str]) -> None:
    replies = iter([b"HTTP/1.1 200 OK", b"HTTP/1.1 503 Service Unavailable"])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(next(replies) + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/health"
        assert await asyncio.to_thread(cli.main, ["health", url, *PATIENTLY]) == cli.OK
        assert await asyncio.to_thread(cli.main, ["health", url, *PATIENTLY]) == cli.FAILED
    assert "503" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["ftp://there:1", "file:///etc/passwd"])
def test_another_scheme_is_a_wrong_command_line(target: str) -> None:
    assert cli.main(["health", target]) == cli.USAGE


async def test_a_name_too_long_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="longer than"):
        await check("127.0.0.1:1", service="x" * 200)
