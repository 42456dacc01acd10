"""Runs the ledger's script: one call, one atomic change. Knows Redis's errors and nothing of the ledger."""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import hiredis
from redis import exceptions as redis_errors

from milepost import errors
from milepost_buffer.connection import CALL_ERRORS, RedisLink, is_closed
from milepost_buffer.metrics import REDIS_ERRORS, REDIS_SECONDS
from milepost_buffer.refusals import refusal
from milepost_common.metrics import Counter, Histogram
from milepost_common.metrics.instruments import Series

RUNS_KEY = "mp:runs"
RETRY_AFTER_S = 1.0
_HEADING, _COMMAND = re.compile(r"(?m)^-- -{40,} "), re.compile(r"(?m)^function C\.(\w+)")
_OUT_OF_MEMORY = "OOM command not allowed"
"""Within the words of a script's error: a Redis before 7 gives that no name of its own."""

_MULTI, _EXEC = hiredis.pack_command(("MULTI",)), hiredis.pack_command(("EXEC",))

Arg = str | bytes | int
Clock = Callable[[], int | None]


def prefix_of(run_id: str) -> str:
    """Prefix of a run's keys; the braces put them into one hash slot."""
    return f"mp:{{{run_id}}}:"


class Script(NamedTuple):
    """What Redis runs for a command."""

    source: str
    sha: str


def scripts_of(source: str) -> dict[str, Script]:
    """The script of each command: the sections without commands, and the one that defines it.

    Lines of other sections are left empty, so that line numbers in errors are those of the file.
    """
    starts = [0, *(m.start() for m in _HEADING.finditer(source)), len(source)]
    sections = [source[a:b] for a, b in itertools.pairwise(starts)]
    scripts: dict[str, Script] = {}
    for section in sections:
        commands = _COMMAND.findall(section)
        text = "".join(
            s if s is section or not _COMMAND.search(s) else "\n" * s.count("\n") for s in sections
        )
        script = Script(text, hashlib.sha1(text.encode()).hexdigest())
        scripts |= dict.fromkeys(commands, script)
    return scripts


def _stage(prefix: str, payloads: Sequence[bytes]) -> list[bytes]:
    """A transaction's begin, with every payload as the value of P put:<i>; the payloads are not copied."""
    parts: list[bytes] = []
    between = b"%s*%d\r\n$4\r\nMSET\r\n" % (_MULTI, 1 + 2 * len(payloads))
    for i, payload in enumerate(payloads, 1):
        key = f"{prefix}put:{i}".encode()
        parts += (b"%s$%d\r\n%s\r\n$%d\r\n" % (between, len(key), key, len(payload)), payload)
        between = b"\r\n"
    return [*parts, between]


def _check(reply: Any) -> None:
    if isinstance(reply, Exception):
        raise reply


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
        self._known: dict[str, Series] = {}
        self._scripts = scripts_of(
            importlib.resources.files("milepost_buffer").joinpath("ledger.lua").read_text()
        )

    async def call(self, run_id: str, command: str, *args: Arg, staged: Sequence[bytes] = ()) -> list[Any]:
        """Runs one command; returns what stands behind the status.

        Args:
          run_id: the run.
          command: its name in the script.
          args: its arguments.
          staged: payloads, written to P put:<i> in the same transaction: they need not pass through Lua.

        Raises:
          MilepostError: what the script refused, or Unavailable while Redis is away.
        """
        injected = self._clock() if self._clock is not None else None
        now = "" if injected is None else str(injected)
        started = time.perf_counter()
        prefix = prefix_of(run_id)
        staging = _stage(prefix, staged) if staged else ()
        reply = await self._eval(self._scripts[command], staging, prefix + "run", command, now, *args)
        self._series(command).record(time.perf_counter() - started)
        if reply[0] == b"!":
            raise refusal(run_id, reply)
        if command != "stats":
            self.asked_at[run_id] = started
        return reply[1:]

    def _series(self, command: str) -> Series:
        found = self._known.get(command)
        if found is None:
            found = self._known[command] = self.seconds.series(command)
        return found

    async def _eval(self, script: Script, staging: Sequence[bytes], *args: Arg) -> list[Any]:
        try:
            try:
                return await self._execute(staging, "EVALSHA", script.sha, 1, *args)
            except redis_errors.NoScriptError:
                return await self._execute(staging, "EVAL", script.source, 1, *args)
        except CALL_ERRORS as error:
            raise self.translate(error) from error

    async def _execute(self, staging: Sequence[bytes], *args: Arg) -> Any:
        """One command; with `staging` a transaction of that and the command."""
        packed = hiredis.pack_command(cast(Any, args))
        if not staging:
            [reply] = await self.link.ask([packed], replies=1)
        else:
            replies = await self.link.ask([*staging, packed, _EXEC], replies=4)
            for reply in replies[:-1]:
                _check(reply)  # what was not queued, and why
            _check(replies[-1])
            staged, reply = replies[-1]
            _check(staged)
        _check(reply)
        return reply

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
            reply = await self._execute((), *args)
            self._series(str(args[0]).lower()).record(time.perf_counter() - started)
            return reply
        except CALL_ERRORS as error:
            raise self.translate(error) from error

    async def commands(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        """Plain Redis commands of one name, sent at once; an error of one is an error of all."""
        started = time.perf_counter()
        try:
            packed = b"".join([hiredis.pack_command(cast(Any, tuple(args))) for args in commands])
            replies = await self.link.ask([packed], replies=len(commands))
            for reply in replies:
                _check(reply)
            self._series(str(commands[0][0]).lower()).record(time.perf_counter() - started)
            return replies
        except CALL_ERRORS as error:
            raise self.translate(error) from error
