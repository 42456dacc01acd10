"""What every service process does first: allocator, signals, telemetry; and an end that a parent can rely on.

    if __name__ == "__main__":
        sys.exit(run("router", main, telemetry=settings.telemetry))

With MILEPOST_DIE_WITH_PARENT in its environment it ends when its parent does: by SIGTERM, or by SIGKILL where
the value is `kill`, which ends a suspended process too.

`main(stop)` is a coroutine that serves until the event `stop` is set (by SIGTERM or SIGINT) and returns the
exit status. A second signal, or `STOP_DEADLINE_S` after the first, ends the process whatever it is doing.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from milepost_common.telemetry import logs

if TYPE_CHECKING:
    from milepost_common.settings import TelemetrySettings

STOP_DEADLINE_S = 30.0
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_BYTES = 64 * 1024 * 1024

_GC_THRESHOLDS = (10_000, 20, 50)

Main = Callable[[asyncio.Event], Awaitable[int]]
log = logging.getLogger(__name__)


def run(
    name: str,
    main: Main,
    *,
    telemetry: TelemetrySettings | None = None,
    stop_deadline_s: float = STOP_DEADLINE_S,
) -> int:
    """Runs a service's coroutine under uvloop until a signal stops it; returns the exit status.

    Args:
      name: of the service.
      main: serves until its event is set.
      telemetry: format of the logs, and where traces go; None: text, and nowhere.
      stop_deadline_s: from the signal to the end.
    """
    import uvloop

    set_up_logging(name, telemetry.log_format if telemetry else "text")
    faulthandler.enable()
    tune_malloc()
    follow_parent()
    if telemetry is None:
        return uvloop.run(_until_stopped(main, stop_deadline_s))
    from milepost_common.telemetry.export import exporting

    with exporting(name, telemetry):
        return uvloop.run(_until_stopped(main, stop_deadline_s))


async def _until_stopped(main: Main, stop_deadline_s: float) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("second %s: leaving at once", number.name)
            os._exit(128 + number)
        log.info("%s: stopping within %.0f s", number.name, stop_deadline_s)
        stop.set()
        loop.call_later(stop_deadline_s, _give_up, stop_deadline_s)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return await main(stop)


def _give_up(deadline_s: float) -> None:
    log.error("not stopped after %.0f s: leaving; stacks follow", deadline_s)
    faulthandler.dump_traceback()
    os._exit(70)


def set_up_logging(name: str, log_format: logs.LogFormat = "text") -> None:
    """Logs to stderr, one line an event; MILEPOST_LOG sets the level (default INFO)."""
    logs.set_up(name, log_format)


def announce(name: str, **addresses: str) -> None:
    """Prints the readiness line, `milepost <name> ready grpc=host:port ...`, exactly once."""
    settle_garbage_collector()
    parts = " ".join(f"{key}={value}" for key, value in addresses.items() if value)
    print(f"milepost {name} ready {parts}", flush=True)


def settle_garbage_collector() -> None:
    """Takes all that is alive at the start out of garbage collection, and collects less often.

    Modules, settings and descriptors live as long as the process: walking through them again and again cost
    a tenth of the router's time.
    """
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def tune_malloc() -> None:
    """Keeps MiB-size buffers on the heap: with glibc's default each message is mapped and unmapped anew."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _MMAP_THRESHOLD_BYTES)


def follow_parent() -> None:
    """Does what MILEPOST_DIE_WITH_PARENT in the environment asks for; the head of this module says what."""
    if how := os.environ.get("MILEPOST_DIE_WITH_PARENT"):
        die_with_parent(signal.SIGKILL if how == "kill" else signal.SIGTERM)


def die_with_parent(number: signal.Signals = signal.SIGTERM, *, parent: int | None = None) -> None:
    """Asks the kernel for `number` when the parent ends (Linux), so that no child outlives its owner.

    Args:
      number: the signal.
      parent: the parent's process id, where it is known: it may have ended before this is called.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it went away before the request
        os.kill(os.getpid(), number)
