"""Child processes of a service, started without running the fork handlers of its libraries.

    process = spawning.start(sys.executable, "-m", "module", leash=signal.SIGKILL)
    status = await process.wait()

uvloop starts a process by a fork that runs pthread_atfork handlers, and so does `subprocess` where it has a
`preexec_fn`. In a process with live gRPC channels or servers, gRPC's handlers abort some of the children
before they execute anything, or hang them, and with them the parent that waits for that. `subprocess` without
a `preexec_fn` uses vfork, which runs no handlers and copies no page tables: the parent stands for about a
millisecond.

What a `preexec_fn` was needed for, the parent-death signal, is asked for by a program in between, `leash.py`,
which then becomes the child: the process id is the same. The signal comes when the *thread* that started the
child ends, so a leashed child is started on the main thread.

The end is told by a pidfd per waiter, open for as long as it waits: no thread, no signal handler, and nothing
that is left behind by a waiter that is cancelled. Whoever looks first, by `wait` or `returncode`, reaps.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

LEASH = str(Path(__file__).with_name("leash.py"))
_POLL_S = 0.05


class Process:
    """A child process; made by `start`."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative where a signal ended it; None while it runs."""
        return self._popen.poll()

    async def wait(self) -> int:
        """Waits for its end; returns the exit status. Any number of tasks may wait."""
        while (status := self.returncode) is None:
            await _until_ended(self.pid)
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal; does nothing after its end."""
        self._popen.send_signal(number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start(
    *command: str,
    leash: signal.Signals | None = None,
    stdin: int | IO[bytes] | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    pass_fds: tuple[int, ...] = (),
    start_new_session: bool = False,
) -> Process:
    """Starts a process. It blocks until the program runs: about a millisecond.

    Args:
      command: program and arguments.
      leash: what the kernel sends it when this process ends, however that happens (Linux); None: nothing.
      stdin: a descriptor or file of its own, not `PIPE`; as are the next two.
      stdout: None: this process's.
      stderr: None: this process's.
      env: its environment; None: this process's.
      pass_fds: descriptors that it inherits besides.
      start_new_session: whether it leads a session, and so a process group, of its own.

    Raises:
      OSError: the program cannot be started.
    """
    if leash is not None:
        program, path = command[0], (os.environ if env is None else env).get("PATH")
        if shutil.which(program, path=path) is None:  # the leash would find out too late to raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), program)
        command = (sys.executable, "-I", "-S", LEASH, str(int(leash)), str(os.getpid()), *command)
    return Process(
        subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            pass_fds=pass_fds,
            start_new_session=start_new_session,
        )
    )


async def _until_ended(pid: int) -> None:
    """Returns when a child that was not reaped before has ended, or a little earlier without pidfds."""
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):  # another system, an old kernel, or no descriptors left
        await asyncio.sleep(_POLL_S)
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        loop.add_reader(descriptor, ended.set)
        stack.callback(loop.remove_reader, descriptor)
        await ended.wait()
