"""The CPU engine's server: builds the model, listens, registers, and leaves in order.

`serve` ends when it is told to stop or when the scheduler dies. On the way out it leaves the router first,
then ends live requests, whose replies go out before connections close.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Generator
from typing import Any

import uvicorn

from milepost.errors import MilepostError
from milepost_common.metrics.export import serving
from milepost_engine.app import create_app
from milepost_engine.engine import Engine, build
from milepost_engine.metrics import SchedulerView
from milepost_engine.registration import Registrar, describe
from milepost_engine.runner import UnsupportedModel
from milepost_engine.settings import EngineSettings

logger = logging.getLogger("milepost_engine")
_CLOSE_GRACE_S = 1.0


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to the process and says when it listens."""

    def __init__(self, config: uvicorn.Config, settings: EngineSettings, engine: Engine) -> None:
        super().__init__(config)
        self._settings, self._engine = settings, engine
        self.registrar: Registrar | None = None
        self.metrics = ""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """The process handles signals."""
        yield

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Listens, then prints the ready line."""
        try:
            await super().startup(sockets)
        except SystemExit:  # uvicorn has logged the cause, and let go of what it had started
            at = f"port = {self._settings.port} on host = {self._settings.host!r}"
            print(
                f"milepost: engine: {at}: cannot listen; is the port taken? choose another one",
                file=sys.stderr,
            )
            raise SystemExit(1) from None
        if not self.started or not self.servers:
            return
        port = self.servers[0].sockets[0].getsockname()[1]
        settings = self._settings
        url = f"http://{settings.host}:{port}"
        metrics = f" metrics={self.metrics}" if self.metrics else ""
        print(f"engine ready {url} model={settings.name} dialect={settings.dialect}{metrics}", flush=True)
        if settings.router:
            known_as = describe(settings, url=url, context_length=self._engine.limits.context_length)
            self.registrar = Registrar(settings.router, engine=known_as, admin_api_key=settings.admin_api_key)
            self.registrar.start()


async def serve(settings: EngineSettings, stop: asyncio.Event) -> int:
    """Serves until `stop` is set or the scheduler dies; returns the exit status."""
    failed = asyncio.Event()

    def on_death(error: BaseException) -> None:
        logger.error("the scheduler died (%r): leaving", error)
        failed.set()
        stop.set()

    try:
        engine = build(settings, on_death=on_death)
    except (UnsupportedModel, OSError, ValueError) as error:
        print(f"milepost: engine: {error}", file=sys.stderr, flush=True)
        return 2
    server = _server(engine, settings)
    stopper = asyncio.create_task(_stop_when_asked(stop, engine, server))
    try:
        async with _metered(engine, settings) as server.metrics:
            await server.serve()
    except MilepostError as error:
        print(f"milepost: engine: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        stopper.cancel()
    if failed.is_set():
        return 1
    return 0 if server.started else 2


def _metered(engine: Engine, settings: EngineSettings) -> contextlib.AbstractAsyncContextManager[str]:
    """Serves the engine's metrics until the block ends, which gets their address."""
    max_tokens = settings.max_running_requests * engine.limits.context_length
    view = SchedulerView(engine.scheduler, model=settings.name, max_tokens=max_tokens)
    return serving("engine", view.instruments, listen=settings.metrics_listen, telemetry=settings.telemetry)


def _server(engine: Engine, settings: EngineSettings) -> _Server:
    config = uvicorn.Config(
        create_app(engine),
        host=settings.host,
        port=settings.port,
        http="httptools",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(int(settings.shutdown_timeout_s / 2), 1),
        backlog=2048,
    )
    return _Server(config, settings, engine)


async def _stop_when_asked(stop: asyncio.Event, engine: Engine, server: _Server) -> None:
    """Leaves the router, then ends live requests, whose replies go out before connections close."""
    await stop.wait()
    if server.registrar:
        await server.registrar.close()
    scheduler = engine.scheduler
    future = scheduler.call(lambda: scheduler.abort(everything=True, message="the engine is shutting down"))
    with contextlib.suppress(Exception):
        await asyncio.wait_for(asyncio.wrap_future(future), _CLOSE_GRACE_S)
    server.should_exit = True
