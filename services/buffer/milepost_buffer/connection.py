"""One Redis: how to reach it, whether it may be trusted with the ledger, and which incarnation of it answers.

`RedisLink.run_id` is Redis's own run id. It is read anew on every new connection, and a restart or a
failover breaks every connection, so that it changes with the first call that the new Redis answers.

The ledger's calls go over one connection (`ask`), a subscription has one of its own (`open`); what happens
once at the start goes over redis-py's pool (`client`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from milepost import errors
from milepost_buffer.wire import OnMessage, Wire, ignore, open_wire

SCHEMA_KEY = "mp:schema"
SCHEMA = "1"
CONNECT_TIMEOUT_S = 3.0
CALL_TIMEOUT_S = 8.0
RETRY_S = 0.1
QUIET_S = 2.0

CALL_ERRORS = (RedisError, OSError, RuntimeError)
"""What a call to Redis may raise; RuntimeError is uvloop's, see `is_closed`."""

log = logging.getLogger(__name__)


class RedisLink:
    """A pool of connections to one Redis and the run id of the incarnation that it reaches.

    Attributes:
      url: where it is, fit for messages: without a password.
      run_id: Redis's own run id.
      client: the pool.
    """

    def __init__(self, url: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self.url = without_password(url)
        self.run_id = ""
        self._timeout_s = timeout_s
        self._wire: Wire | None = None
        self._opening: asyncio.Task[Wire] | None = None
        try:
            self.client: Redis = Redis.from_url(
                url,
                protocol=2,
                socket_timeout=timeout_s,
                socket_connect_timeout=min(CONNECT_TIMEOUT_S, timeout_s),
                retry=Retry(NoBackoff(), 0),
                redis_connect_func=self._on_connect,
            )
        except ValueError as error:
            raise errors.InvalidArgument(
                f"redis_url = {self.url}: {error}; give redis://host:port, rediss://host:port or unix:///path"
            ) from error

    async def _on_connect(self, connection: Any) -> None:
        await connection.on_connect()
        await connection.send_command("INFO", "server")
        self.run_id = _parse_info(await connection.read_response())["run_id"]

    async def ask(self, parts: Sequence[bytes], *, replies: int) -> list[Any]:
        """Sends packed commands over the shared connection, which is opened where there is none.

        Returns:
          The replies, errors among them as exceptions.
        """
        wire = self._wire
        if wire is None or not wire.is_open:
            wire = await self._open()
        return await wire.ask(parts, replies=replies)

    async def _open(self) -> Wire:
        """One attempt, shared by all who wait for it, so that it ends for all of them at the same time."""
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._connect(), name="redis")
        return await asyncio.shield(self._opening)

    async def _connect(self) -> Wire:
        self._wire = await self.open(timeout_s=self._timeout_s)
        return self._wire

    async def open(self, *, timeout_s: float, on_message: OnMessage = ignore) -> Wire:
        """Another connection; the caller owns it."""
        return await open_wire(self.client.connection_pool, timeout_s=timeout_s, on_message=on_message)

    async def close(self) -> None:
        """Closes every connection."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._wire is not None:
            self._wire.close()
        await self.client.aclose()

    async def wait_ready(self, *, wait_s: float) -> None:
        """Waits until Redis answers.

        Raises:
          Unavailable: it did not within `wait_s`.
        """
        loop = asyncio.get_running_loop()
        started, told = loop.time(), False
        deadline = started + wait_s
        while True:
            try:
                await self.client.ping()
                return
            except (RedisError, OSError) as error:
                if loop.time() >= deadline:
                    raise errors.Unavailable(
                        f"redis_url = {self.url}: no answer within redis_wait_s = {wait_s:g} ({error}); "
                        "start Redis, correct redis_url, or leave redis_url empty to use the embedded server",
                        reason="REDIS_DOWN",
                    ) from error
                if not told and loop.time() - started > QUIET_S:
                    log.warning(
                        "redis_url = %s does not answer (%s); retrying for %g s", self.url, error, wait_s
                    )
                    told = True
            await asyncio.sleep(RETRY_S)

    async def check(self, *, require_aof: bool) -> None:
        """Refuses a Redis that would lose or evict the ledger, or that another schema wrote.

        Raises:
          FailedPrecondition: names the setting of Redis and the remedy.
        """
        persistence = dict(await self.client.info("persistence"))
        memory = dict(await self.client.info("memory"))
        check_durability(persistence, memory, url=self.url, require_aof=require_aof)
        if require_aof:
            await self._warn_of_window()
        await self.client.set(SCHEMA_KEY, SCHEMA, nx=True)
        stored: Any = await self.client.get(SCHEMA_KEY)
        found = stored.decode() if stored else ""
        if found != SCHEMA:
            raise errors.FailedPrecondition(
                f"{SCHEMA_KEY} = {found}: this Redis holds ledgers of another schema, this build writes "
                f"{SCHEMA}; use "
                "the build that wrote it, or another Redis",
                reason="SCHEMA",
            )

    async def _warn_of_window(self) -> None:
        try:
            fsync = (await self.client.config_get("appendfsync")).get("appendfsync", "")
        except RedisError:  # CONFIG is often forbidden on managed servers
            return
        if fsync != "always":
            log.warning(
                "redis appendfsync = %s: writes of the last second or more may be lost in a crash; "
                "clients restate "
                "them, and `CONFIG SET appendfsync always` closes the window",
                fsync,
            )


def check_durability(
    persistence: Mapping[str, Any], memory: Mapping[str, Any], *, url: str, require_aof: bool
) -> None:
    """Judges `INFO persistence` and `INFO memory`."""
    policy = str(memory.get("maxmemory_policy", ""))
    if policy != "noeviction":
        raise errors.FailedPrecondition(
            f"redis {url}: maxmemory-policy = {policy} would evict the ledger; set maxmemory-policy "
            "noeviction in "
            "redis.conf, or CONFIG SET maxmemory-policy noeviction",
            reason="REDIS_EVICTS",
            metadata={"maxmemory-policy": policy},
        )
    if require_aof and int(persistence.get("aof_enabled", 0)) != 1:
        raise errors.FailedPrecondition(
            f"redis {url}: appendonly = no loses the ledger at a restart; set appendonly yes and "
            "appendfsync always in "
            "redis.conf, or accept the loss with require_aof = false",
            reason="REDIS_WITHOUT_AOF",
            metadata={"appendonly": "no"},
        )


def is_closed(error: Exception) -> bool:
    """Uvloop's word for a connection that broke between two calls, before redis-py has noticed."""
    return isinstance(error, RuntimeError) and "the handler is closed" in str(error)


def without_password(url: str) -> str:
    """The URL with its password, if it has one, replaced by asterisks."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return url.replace(f":{parts.password}@", ":***@", 1)


def _parse_info(raw: bytes | str) -> dict[str, str]:
    text = raw.decode() if isinstance(raw, bytes) else raw
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {key: value for key, _, value in pairs}
