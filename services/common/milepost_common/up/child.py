"""One child process: its group, its log, its lines, and an end that is certain.

The child leads a session of its own, so that Ctrl-C in the terminal reaches the supervisor alone, and
whatever it leaves behind can be ended with it. The kernel ends it when the supervisor dies, however that
happens. What it prints goes to its log; standard output is read here as well, line by line, for the readiness
line.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from milepost_common import spawning

_LONGEST_LINE = 64 * 1024
_LEFTOVER_DEADLINE_S, _LEFTOVER_POLL_S = 2.0, 0.02


class Child:
    """A running process; made by `spawn`."""

    def __init__(self, process: spawning.Process, lines: asyncio.Task[None]) -> None:
        self._process = process
        self._lines = lines
        self._exit = asyncio.create_task(self._reap(), name=f"reap {process.pid}")

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        *,
        log: Path,
        on_line: Callable[[str], None],
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """Starts a process.

        Args:
          command: program and arguments.
          log: file that its standard output and error are appended to.
          on_line: called with each line of its standard output.
          environ: variables to set beside those of this process.

        Raises:
          OSError: the program cannot be started.
        """
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        # A pipe of our own: asyncio's would make `wait` wait for grandchildren that hold its other end.
        read_end, write_end = os.pipe()
        try:
            process = spawning.start(
                *command,
                leash=signal.SIGTERM,
                stdout=write_end,
                stderr=descriptor,
                env={
                    **os.environ,
                    **(environ or {}),
                    "MILEPOST_DIE_WITH_PARENT": "1",
                    "PYTHONUNBUFFERED": "1",
                },
                start_new_session=True,
            )
        except BaseException:
            os.close(descriptor)
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        lines = asyncio.create_task(_pump(read_end, descriptor, on_line), name=f"log {process.pid}")
        return cls(process, lines)

    @property
    def pid(self) -> int:
        """Its process id, which is its process group's too."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """True until it was reaped."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Waits for its end and that of everything it left behind; returns the exit status."""
        return await asyncio.shield(self._exit)

    def terminate(self) -> None:
        """Asks it to stop; one that was suspended is woken to hear it."""
        self._process.terminate()
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends it and its process group at once."""
        if self.is_alive:
            _signal_group(self.pid, signal.SIGKILL)

    async def stop(self, *, timeout_s: float) -> bool:
        """Asks it to stop, and ends it after `timeout_s`; False when it had to be ended."""
        self.terminate()
        done, _ = await asyncio.wait([self._exit], timeout=timeout_s)
        if not done:
            self.kill()
            await self.wait()
        return bool(done)

    async def _reap(self) -> int:
        code = await self._process.wait()
        await _end_leftovers(self.pid)
        await asyncio.wait([self._lines], timeout=_LEFTOVER_DEADLINE_S)
        self._lines.cancel()
        await asyncio.gather(self._lines, return_exceptions=True)
        return code


async def _pump(read_end: int, descriptor: int, on_line: Callable[[str], None]) -> None:
    """Copies standard output to the log, and tells its lines."""
    stream = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(stream)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: protocol, os.fdopen(read_end, "rb")
    )
    rest = b""
    try:
        while data := await stream.read(_LONGEST_LINE):
            os.write(descriptor, data)
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[-_LONGEST_LINE:]
            for line in lines:
                on_line(line.decode(errors="replace"))
    finally:
        transport.close()
        os.close(descriptor)


async def _end_leftovers(group: int) -> None:
    """Ends processes that the leader left in its group, so that ports and files are free before a restart."""
    for _ in range(round(_LEFTOVER_DEADLINE_S / _LEFTOVER_POLL_S)):
        if not _signal_group(group, signal.SIGKILL):
            return
        await asyncio.sleep(_LEFTOVER_POLL_S)


def _signal_group(group: int, number: signal.Signals) -> bool:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def tail(path: Path, *, num_lines: int = 20) -> list[str]:
    """The last lines of a log."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]
    except OSError as error:
        return [f"{path}: {error.strerror}"]
