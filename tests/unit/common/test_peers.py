"""Connections to peers that may vanish: the kernel is told to look, on sockets of ours and of transports."""

from __future__ import annotations

import asyncio
import socket
import sys

import pytest
import uvloop

from milepost_common.peers import DEAD_PEER_S, open_socket, watch_peer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TCP_USER_TIMEOUT is Linux's")


def looks_after(connection: socket.socket) -> bool:
    """The kernel asks the peer, and gives it up in time."""
    asks = connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    idle_s = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    each_s = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
    times = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
    gives_up_s = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
    return asks and idle_s + each_s * times <= DEAD_PEER_S and gives_up_s <= DEAD_PEER_S


def test_a_socket_of_ours_is_watched() -> None:
    address = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))
    with open_socket(address) as ours:
        assert looks_after(ours)


def test_the_socket_of_a_transport_is_watched_and_stays_open() -> None:
    assert uvloop.run(_watch_one())


async def _watch_one() -> bool:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(2))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        watch_peer(writer.get_extra_info("socket"))
        writer.write(b"hi")
        heard = await asyncio.wait_for(reader.readexactly(2), 10)
        number = writer.get_extra_info("socket").fileno()
        with socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as same:
            watched = looks_after(same)
        writer.close()
        await writer.wait_closed()
    return watched and heard == b"hi"
