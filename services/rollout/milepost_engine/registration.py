"""Makes an engine known to its router, and keeps it known.

    engine process, or its launcher     router
      register(engine, instance) ------>  JOINING ... STALE | SERVING(v)
      heartbeat every interval   ------>  alive; or: start it again, it hangs (to launchers alone)
      (NOT_FOUND: register again)
      drain, remove              ------>  no new requests; forgotten

The registrar owns one task. It ends with `close()`, which drains within a deadline, or with `abandon()`; a
router that is away never keeps the engine from starting or from stopping.
"""

from __future__ import annotations

import asyncio
import logging
import uuid

from milepost.channel import NO_RETRY
from milepost.client import RouterClient
from milepost.errors import MilepostError, NotFound
from milepost.types import Engine, EngineCapabilities, Transport
from milepost_engine.dialect import DIALECTS
from milepost_engine.settings import EngineSettings

log = logging.getLogger(__name__)

RETRY_S = 1.0
DRAIN_S = 2.0
TRANSPORTS = (Transport.GLOO, Transport.SHM, Transport.DISK)


def describe(settings: EngineSettings, *, url: str, context_length: int) -> Engine:
    """This engine as its router is to know it; the instance is new at each call."""
    reached_at = settings.advertise or url
    dialect = DIALECTS[settings.dialect]
    return Engine(
        engine_id=settings.engine_id or reached_at.rpartition("/")[2],
        url=reached_at,
        run_id=settings.run_id,
        instance_id=uuid.uuid4().hex,
        capabilities=EngineCapabilities(
            engine=f"milepost {settings.dialect}",
            update_session=dialect.has_update_session,
            version_spans=dialect.reports_version_spans,
            checksum=True,
            transports=TRANSPORTS,
            context_length=context_length,
        ),
    )


def introduce(settings: EngineSettings, *, url: str, gpu_uuids: tuple[str, ...], nccl_version: str) -> Engine:
    """An engine that we launched: all else that it can do, the router asks it itself."""
    reached_at = settings.advertise or url
    return Engine(
        engine_id=settings.engine_id or reached_at.rpartition("/")[2],
        url=reached_at,
        run_id=settings.run_id,
        instance_id=uuid.uuid4().hex,
        capabilities=EngineCapabilities(gpu_uuids=gpu_uuids, restartable=True, nccl_version=nccl_version),
    )


class Registrar:
    """Registers one engine and sends its heartbeats.

    Args:
      router: `host:port` of the router's gRPC side.
      engine: what to register; `instance_id` must be new at each start of the process.
      admin_api_key: key of the engine's admin routes, which the router needs.
      drain_s: how long the engine's requests may take to end when it leaves.

    Attributes:
      restart: set when the router orders that the engine be started again.
    """

    def __init__(
        self, router: str, *, engine: Engine, admin_api_key: str = "", drain_s: float = DRAIN_S / 2
    ) -> None:
        self._client = RouterClient(router, retry=NO_RETRY, timeout_s=5.0)
        self._engine = engine
        self._key, self._drain_s = admin_api_key, drain_s
        self.restart = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._registered = False

    def start(self) -> None:
        """Starts the task."""
        self._task = asyncio.create_task(self._keep_known(), name="registrar")

    async def abandon(self) -> None:
        """The engine's process is gone: no more heartbeats, and nothing to drain."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._client.close()

    async def close(self) -> None:
        """Drains and removes the engine, within `drain_s` and a second, if the router is there."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        try:
            if self._registered:
                async with asyncio.timeout(self._drain_s + DRAIN_S / 2):
                    await self._client.drain_engine(self._engine.engine_id, max_wait_s=self._drain_s)
                    await self._client.remove_engine(self._engine.engine_id)
        except (MilepostError, TimeoutError) as error:
            log.warning("engine %s leaves without the router's consent: %s", self._engine.engine_id, error)
        finally:
            await self._client.close()

    async def _keep_known(self) -> None:
        failed = ""
        while True:
            try:
                await self._register_and_beat()
            except NotFound:
                log.info("router %s does not know this engine: registering again", self._client.address)
            except MilepostError as error:
                if str(error) != failed:
                    log.warning("cannot register with the router: %s; trying on", error)
                failed = str(error)
                await asyncio.sleep(RETRY_S)

    async def _register_and_beat(self) -> None:
        registration = await self._client.register_engine(self._engine, admin_api_key=self._key)
        self._registered = True
        log.info("registered with router %s as %s", self._client.address, self._engine.engine_id)
        while True:
            await asyncio.sleep(registration.heartbeat_interval_s)
            heard = await self._client.heartbeat(self._engine.engine_id, instance_id=self._engine.instance_id)
            if heard.restart:
                self.restart.set()
