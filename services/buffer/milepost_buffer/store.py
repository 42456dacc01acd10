"""Runs the ledger's script: one call, one atomic change. Knows Redis's errors and nothing of the ledger."""

from __future__ import annotations

import hashlib
import importlib.resources
import time
from collections.abc import Callable
from typing import Any, cast

import hiredis
from redis import exceptions as redis_errors

from milepost import errors
from milepost_buffer.connection import CALL_ERRORS, RedisLink, is_closed
from milepost_buffer.metrics import REDIS_ERRORS, REDIS_SECONDS
from milepost_buffer.refusals import refusal
from milepost_common.metrics import Counter, Histogram

RUNS_KEY = "mp:runs"
RETRY_AFTER_S = 1.0
_OUT_OF_MEMORY = "OOM command not allowed"
"""Within the words of a script's error: a Redis before 7 gives that no name of its own."""

Arg = str | bytes | int
Clock = Callable[[], int | None]


def prefix_of(run_id: str) -> str:
    """Prefix of a run's keys; the braces put them into one hash slot."""
    return f"mp:{{{run_id}}}:"


class Store:
    """The script on one Redis.

    Args:
      link: the Redis.
      clock: returns the time in ms, for tests. Unset, or answering None: Redis's own, one for all replicas.

    Attributes:
      seconds, failures: time of calls to Redis by command, and calls that failed.
      asked_at: when somebody last asked about each run, other than for its counts.
    """

    def __init__(self, link: RedisLink, *, clock: Clock | None = None) -> None:
        self.link = link
        self._clock = clock
        self.seconds, self.failures = Histogram(REDIS_SECONDS), Counter(REDIS_ERRORS)
        self.asked_at: dict[str, float] = {}
        self._source = importlib.resources.files("milepost_buffer").joinpath("ledger.lua").read_bytes()
        self._sha = hashlib.sha1(self._source).hexdigest()

    async def call(self, run_id: str, command: str, *args: Arg) -> list[Any]:
        """Runs one command; returns what stands behind the status.

        Raises:
          MilepostError: what the script refused, or Unavailable while Redis is away.
        """
        injected = self._clock() if self._clock is not None else None
        now = "" if injected is None else str(injected)
        started = time.perf_counter()
        reply = await self._eval(prefix_of(run_id) + "run", command, now, *args)
        self.seconds.record(time.perf_counter() - started, command)
        if reply[0] == b"!":
            raise refusal(run_id, reply)
        if command != "stats":
            self.asked_at[run_id] = started
        return reply[1:]

    async def _eval(self, *args: Arg) -> list[Any]:
        try:
            try:
                return await self._execute("EVALSHA", self._sha, 1, *args)
            except redis_errors.NoScriptError:
                return await self._execute("EVAL", self._source, 1, *args)
        except CALL_ERRORS as error:
            raise self.translate(error) from error

    async def _execute(self, *args: Arg) -> Any:
        """One command on a connection of the pool, packed in C; a connection that fails closes itself.

        Not by `execute_command` of redis-py: that packs in Python, and retries and observes each call.
        """
        pool: Any = self.link.client.connection_pool
        connection = await pool.get_connection()
        try:
            await connection.send_packed_command(hiredis.pack_command(cast(Any, args)))
            return await connection.read_response()
        finally:
            await pool.release(connection)

    def translate(self, error: Exception) -> errors.MilepostError:
        """The error of our tree for what redis-py raised; it is counted."""
        translated = self._translate(error)
        self.failures.add(translated.reason)
        return translated

    def _translate(self, error: Exception) -> errors.MilepostError:
        if isinstance(error, redis_errors.OutOfMemoryError) or _OUT_OF_MEMORY in str(error):
            return errors.ResourceExhausted(
                f"redis {self.link.url} is full: it holds more than its maxmemory; raise that, or lower "
                "max_payload_bytes",
                reason="REDIS_FULL",
                retry_after_s=RETRY_AFTER_S,
            )
        away = (redis_errors.ConnectionError, redis_errors.TimeoutError, redis_errors.ReadOnlyError, OSError)
        if (
            isinstance(error, away)
            or is_closed(error)
            or str(error).startswith(("MISCONF", "MASTERDOWN", "LOADING", "BUSY"))
        ):
            return errors.Unavailable(
                f"redis {self.link.url} is away ({error}); waiting for it",
                reason="REDIS_AWAY",
                retry_after_s=RETRY_AFTER_S,
            )
        return errors.Internal(f"redis {self.link.url}: {type(error).__name__}: {error}; please report this")

    async def runs(self) -> list[str]:
        """Ids of the runs that were ever created on this Redis, sorted."""
        members = await self.command("SMEMBERS", RUNS_KEY)
        return sorted(m.decode() for m in members)

    async def command(self, *args: Arg) -> Any:
        """A plain Redis command, with our errors."""
        started = time.perf_counter()
        try:
            reply = await self._execute(*args)
            self.seconds.record(time.perf_counter() - started, str(args[0]).lower())
            return reply
        except CALL_ERRORS as error:
            raise self.translate(error) from error
