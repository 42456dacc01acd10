"""The HTTP listener: uvicorn's server with our connections, in a loop that somebody else runs and stops."""

from __future__ import annotations

import asyncio
import socket
from types import TracebackType
from typing import Any, Self, cast

import uvicorn

from milepost.errors import InvalidArgument, Unavailable
from milepost_router.http_connection import HttpConnection

BACKLOG = 2048
KEEP_ALIVE_S = 75
STOP_S = 5


class HttpServer:
    """One listening HTTP server.

    Args:
      app: the ASGI app.
      listen: `host:port`; port 0 takes a free one.
      advertise: the address under which others reach it; unset: `listen` with the real port.
    """

    def __init__(self, app: Any, *, listen: str, advertise: str = "") -> None:
        self._listen, self._advertise = listen, advertise
        config = uvicorn.Config(
            app,
            loop="none",
            http=cast(Any, HttpConnection),  # uvicorn takes any protocol of its constructor
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=STOP_S,
        )
        self._config = config
        self._server = uvicorn.Server(config)
        self._sockets: list[socket.socket] = []
        self._loop_task: asyncio.Task[None] | None = None
        self.port = 0

    @property
    def address(self) -> str:
        """The address to give to others."""
        return self._advertise or f"{self._listen.rpartition(':')[0]}:{self.port}"

    async def __aenter__(self) -> Self:
        """Binds and serves.

        Raises:
          Unavailable: the address cannot be bound.
        """
        self._sockets = [_bind(self._listen)]
        self.port = self._sockets[0].getsockname()[1]
        self._config.load()
        self._server.lifespan = self._config.lifespan_class(self._config)
        await self._server.startup(sockets=self._sockets)
        self._loop_task = asyncio.create_task(self._server.main_loop(), name="http main loop")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Refuses new connections, gives running requests `STOP_S`, then ends them."""
        self._server.should_exit = True
        if self._loop_task is not None:
            await self._loop_task
        await self._server.shutdown(sockets=self._sockets)
        for connection in list(self._server.server_state.connections):
            cast(HttpConnection, connection).transport.abort()  # and its request, which no task may hold


def _bind(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidArgument(f"http_listen = {listen!r}: give host:port; port 0 takes a free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host.strip("[]"), int(port)))
    except OSError as error:
        bound.close()
        message = f"http_listen = {listen}: {error.strerror}; is the port taken? choose another one"
        raise Unavailable(message, reason="BIND_FAILED") from error
    bound.setblocking(False)
    return bound
