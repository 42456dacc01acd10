"""The router process: one fleet, two sockets.

    gRPC (RouterService) ──> Transactions ──┐                ┌──> Ledger (buffer)
                                            ├──> Fleet <─────┤
    HTTP (/generate, /v1) ──> Proxy ────────┘                └──> Prober ──> engines

Parts know the fleet and what they are given, never one another's owner; this module wires them. At the end:
transactions are aborted and their members settled, both sockets stop, then the probes, then the connections.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from milepost import types as t
from milepost.v1 import router_pb2_grpc
from milepost_common.metrics import Instrument
from milepost_common.metrics.export import serving
from milepost_common.process import announce
from milepost_common.server import GrpcServer
from milepost_router.control_app import create_control_app
from milepost_router.engine_api import EngineApi
from milepost_router.fleet import Fleet
from milepost_router.http_server import HttpServer
from milepost_router.ledger import Ledger
from milepost_router.memory import Memory
from milepost_router.metrics import FleetView
from milepost_router.probe import Prober
from milepost_router.proxy import Proxy
from milepost_router.record import EngineRecord, Transition
from milepost_router.servicer import RouterServicer
from milepost_router.settings import RouterSettings
from milepost_router.signals import Signal
from milepost_router.transactions import Transactions
from milepost_router.upstream import Pool

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Router:
    """A running router.

    Attributes:
      fleet: its engines.
      grpc_address, http_address: where it is reached.
      instruments: what it counts.
    """

    fleet: Fleet
    grpc_address: str
    http_address: str
    instruments: Sequence[Instrument]


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What a router is made of."""

    fleet: Fleet
    pool: Pool
    ledger: Ledger | None
    memory: Memory
    prober: Prober
    transactions: Transactions
    proxy: Proxy
    servicer: RouterServicer

    def instruments(self) -> list[Instrument]:
        """What they count."""
        view = FleetView(self.fleet, clock=asyncio.get_running_loop().time)
        return [*view.instruments, *self.proxy.meter.instruments, *self.transactions.meter.instruments]


@asynccontextmanager
async def running(settings: RouterSettings) -> AsyncGenerator[Router]:
    """Runs a router until the block ends."""
    parts = _wire(settings)
    _join_known(parts.fleet, settings, now=asyncio.get_running_loop().time())
    parts.prober.start()
    try:
        async with (
            GrpcServer(listen=settings.listen, advertise=settings.advertise) as server,
            HttpServer(parts.proxy, listen=settings.http_listen, advertise=settings.http_advertise) as http,
        ):
            add = router_pb2_grpc.add_RouterServiceServicer_to_server
            server.add(add, parts.servicer, "milepost.v1.RouterService")
            await server.start()
            try:
                yield Router(
                    fleet=parts.fleet,
                    grpc_address=server.address,
                    http_address=http.address,
                    instruments=[*server.meter.instruments, *parts.instruments()],
                )
            finally:
                parts.servicer.stop()
                await parts.transactions.close()
                await parts.memory.close()
    finally:
        await parts.prober.close()
        if parts.ledger is not None:
            await parts.ledger.close()
        parts.pool.close()


def _wire(settings: RouterSettings) -> _Parts:
    """Makes the parts; nothing runs yet."""
    fleet = Fleet(unversioned=not settings.buffer, limits=settings.limits)
    fleet.subscribe(_log)
    changed = Signal()
    ledger = _ledger(settings, fleet)
    pool = Pool(
        connect_timeout_s=settings.connect_timeout_s, on_idle_close=lambda url: prober.look_at_url(url)
    )

    def api(record: EngineRecord) -> EngineApi:
        return EngineApi(pool, record, timeout_s=settings.engine_call_timeout_s)

    memory = Memory(fleet, api, abort_grace_s=settings.abort_grace_s)
    prober = Prober(
        fleet,
        pool,
        api,
        adopt=memory.adopt,
        ledger=ledger,
        interval_s=settings.probe_interval_s,
        timeout_s=settings.probe_timeout_s,
    )
    transactions = Transactions(fleet, api, ledger=ledger, settings=settings)
    control = create_control_app(fleet, clock=asyncio.get_running_loop().time)
    proxy = Proxy(fleet, pool, changed, settings=settings, control=control, look_at=prober.look_at)
    servicer = RouterServicer(
        fleet,
        transactions,
        prober,
        changed,
        memory=memory,
        heartbeat_interval_s=settings.heartbeat_interval_s,
    )
    return _Parts(
        fleet=fleet,
        pool=pool,
        ledger=ledger,
        memory=memory,
        prober=prober,
        transactions=transactions,
        proxy=proxy,
        servicer=servicer,
    )


async def serve(settings: RouterSettings, stop: asyncio.Event) -> int:
    """Runs the router until `stop` is set; returns the exit status."""
    async with (
        running(settings) as router,
        serving(
            "router", router.instruments, listen=settings.metrics_listen, telemetry=settings.telemetry
        ) as metrics,
    ):
        announce("router", grpc=router.grpc_address, http=router.http_address, metrics=metrics)
        await stop.wait()
    return 0


def _ledger(settings: RouterSettings, fleet: Fleet) -> Ledger | None:
    if not settings.buffer:
        log.info("no buffer: engines serve weights without versions")
        return None
    return Ledger(settings.buffer, timeout_s=settings.ledger_timeout_s, on_refused=fleet.disown)


def _join_known(fleet: Fleet, settings: RouterSettings, *, now: float) -> None:
    """Adds the engines of the settings."""
    for entry in settings.engines:
        url = (entry if isinstance(entry, str) else entry.url).rstrip("/")
        engine_id = (entry if isinstance(entry, str) else entry.id) or ""
        if isinstance(entry, str) or not engine_id:
            engine_id = urlsplit(url).netloc
        run_id = "" if isinstance(entry, str) else entry.run_id
        engine = t.Engine(engine_id=engine_id, url=url, run_id=run_id)
        fleet.join(engine, now=now, admin_api_key=settings.admin_api_key)


def _log(transition: Transition | None) -> None:
    if transition is not None and transition.after is not transition.before:
        engine = transition.engine
        log.info("engine %s: %s -> %s: %s", engine.engine_id, transition.before.name, transition.after.name,
                 engine.detail)  # fmt: skip
