"""A peer that vanished without a word: how long until a TCP connection to it is given up.

A host that lost power, a cable, a firewall that forgot a connection: nothing comes any more, and a request
whose answer is awaited would wait for its own deadline, which is minutes for a long sample. The kernel asks
such a peer whether it is still there, and a connection without an answer breaks within `DEAD_PEER_S`. gRPC
channels do the same by themselves (see `milepost.channel`).
"""

from __future__ import annotations

import os
import socket
from typing import Any

DEAD_PEER_S = 10
_IDLE_S, _INTERVAL_S, _TIMES = 4, 3, 2
_OPTIONS = {
    "TCP_KEEPIDLE": _IDLE_S,
    "TCP_KEEPINTVL": _INTERVAL_S,
    "TCP_KEEPCNT": _TIMES,
    "TCP_USER_TIMEOUT": DEAD_PEER_S * 1000,
}


def open_socket(address: tuple[Any, ...]) -> socket.socket:
    """A watched socket for an address of `getaddrinfo`: family, type, protocol, name, where."""
    family, kind, protocol = address[:3]
    created = socket.socket(family=family, type=kind, proto=protocol)
    _watch(created)
    return created


def watch_peer(connected: Any) -> None:
    """Watches the socket of a transport; one that is none of TCP stays as it is."""
    with socket.socket(fileno=os.dup(connected.fileno())) as same:  # options are the connection's
        if same.family in (socket.AF_INET, socket.AF_INET6):
            _watch(same)


def _watch(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS.items():
        if (option := getattr(socket, name, None)) is not None:  # not every system has them all
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
