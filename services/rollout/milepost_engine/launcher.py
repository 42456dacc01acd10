"""Launches an inference server with SGLang's HTTP surface, makes it known to the router, and keeps it alive.

    STARTING -- /health answers --> READY -- told to stop --> DRAINING --> gone
        ^                             |
        +-- died, or hangs: killed ---+      it has the weights it starts with: the router finds it STALE

The router knows of a hang that cannot be seen from here, in a collective whose other members are gone; it
says so in its answer to a heartbeat.

This process owns the server's whole tree: it runs in a process group of its own, is killed as a group, and
dies with this process (`spawning`), as SGLang's own children die with SGLang. A start that fails is tried
again with growing pauses, `MAX_FAILED_STARTS` times in a row; the first start of all is not, since its
settings are the likely cause. Each start registers as a new instance. No torch here: the launcher must not
take memory of the GPU it watches over.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import logging
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from milepost.errors import InvalidArgument, Unavailable
from milepost_common import spawning
from milepost_common.liveness import until_silent
from milepost_engine import gpus, sglang_options
from milepost_engine.registration import Registrar, introduce
from milepost_engine.settings import EngineSettings

log = logging.getLogger(__name__)

MODULE = "sglang.launch_server"
MAX_FAILED_STARTS = 3
MAX_PAUSE_S = 30.0
LOOK_EVERY_S = 1.0
LOOK_S = 10.0
KILL_S = 10.0
ABORT_GRACE_S = 0.5
WARM_UP: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 2, "temperature": 1.0},
    {"max_new_tokens": 2, "temperature": 1.0, "top_p": 0.9, "top_k": 5},
)


class Launcher:
    """Runs one server until it is told to stop.

    Args:
      settings: the engine's.
      module: what to run with `python -m`.
      arguments: its command line.
      port: where it will listen.
      release: named in the readiness line.
      gpu_uuids: its GPUs, one a rank; empty: unknown.
      nccl_version: of the NCCL that it runs with; empty: unknown.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        module: str,
        arguments: Sequence[str],
        port: int,
        release: str,
        gpu_uuids: tuple[str, ...] = (),
        nccl_version: str = "",
    ) -> None:
        self._settings, self._module, self._arguments = settings, module, tuple(arguments)
        self._release, self._gpu_uuids, self._nccl_version = release, gpu_uuids, nccl_version
        self._reached = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
        self._url = f"http://{self._reached}:{port}"
        self._announced = False

    async def run(self, stop: asyncio.Event) -> int:
        """Keeps the server alive until `stop`; returns 0 stopped, 1 given up, 2 it never served."""
        failed = 0
        while not stop.is_set():
            served = await self._one_life(stop)
            if stop.is_set():
                break
            if not self._announced:
                log.error("the server ended before it served: its own messages are above")
                return 2
            failed = 0 if served else failed + 1
            if failed >= MAX_FAILED_STARTS:
                log.error("%d starts in a row failed: giving up", failed)
                return 1
            await _pause(stop, min(2.0**failed, MAX_PAUSE_S))
        return 0

    async def _one_life(self, stop: asyncio.Event) -> bool:
        """From a start to its end, whatever ends it; returns whether it served."""
        process = self._start()
        registrar: Registrar | None = None
        try:
            if not await self._until_ready(process, stop):
                return False
            await self._warm_up(stop)
            self._announce()
            registrar = self._register()
            await self._watch(process, stop, registrar.restart if registrar else asyncio.Event())
            if registrar and process.returncode is None and stop.is_set():
                await registrar.close()
                registrar = None
                await self._hand_over()
            return True
        finally:
            if registrar:
                await registrar.abandon()
            await self._end(process)

    def _start(self) -> spawning.Process:
        log.info("starting %s %s", self._module, " ".join(_without_secrets(self._arguments)))
        return spawning.start(
            *(sys.executable, "-m", self._module, *self._arguments),
            leash=signal.SIGKILL,
            stdout=sys.stderr.fileno(),  # standard output is for our readiness line
            start_new_session=True,
        )

    async def _until_ready(self, process: spawning.Process, stop: asyncio.Event) -> bool:
        deadline = _now() + self._settings.start_timeout_s
        while _now() < deadline:
            if process.returncode is not None:
                log.error("the server ended with status %d while it started", process.returncode)
                return False
            if stop.is_set():
                return False
            if await self._answers("/health"):
                return True
            await _pause(stop, LOOK_EVERY_S)
        log.error("the server did not serve within %.0f s of its start", self._settings.start_timeout_s)
        return False

    async def _warm_up(self, stop: asyncio.Event) -> None:
        """Has it compile its sampling now: for a minute, which would otherwise stall its first update."""
        key, left_s = self._settings.admin_api_key, self._settings.start_timeout_s
        stopping = asyncio.create_task(stop.wait())
        for sampling in WARM_UP:
            body = json.dumps(
                {"input_ids": [0], "sampling_params": sampling, "return_logprob": True}
            ).encode()
            call = asyncio.to_thread(_ask, f"{self._url}/generate", key, body, timeout_s=left_s)
            asking = asyncio.create_task(call)
            await asyncio.wait({asking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                return  # the server is killed next, which ends the call
            if not asking.result():
                log.warning("it did not answer a first request with %s", sampling)
        stopping.cancel()

    def _announce(self) -> None:
        if self._announced:
            log.info("the server serves again")
            return
        self._announced = True
        print(
            f"engine ready {self._url} model={self._settings.name} dialect={self._release}",
            flush=True,
        )

    def _register(self) -> Registrar | None:
        if not self._settings.router:
            return None
        registrar = Registrar(
            self._settings.router,
            engine=introduce(
                self._settings, url=self._url, gpu_uuids=self._gpu_uuids, nccl_version=self._nccl_version
            ),
            admin_api_key=self._settings.admin_api_key,
            drain_s=self._settings.shutdown_timeout_s / 2,
        )
        registrar.start()
        return registrar

    async def _watch(self, process: spawning.Process, stop: asyncio.Event, restart: asyncio.Event) -> None:
        """Returns when it is to stop or to be started again, has died, or has not answered for too long."""
        hang_s = self._settings.hang_timeout_s
        ordered = asyncio.create_task(restart.wait())
        silent = asyncio.create_task(until_silent(self._look, timeout_s=hang_s))
        waiting = (ordered, silent, asyncio.create_task(process.wait()), asyncio.create_task(stop.wait()))
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if process.returncode is not None:
                log.error("the server died with status %d", process.returncode)
            elif ordered.done():
                log.error("the router says that it hangs in a process group: killing it")
            elif silent.done():
                why = silent.result()
                log.error("its scheduler has not answered for %.0f s: killing it (%s)", hang_s, why)
        finally:
            for task in waiting:
                task.cancel()

    async def _look(self, within_s: float) -> None:
        """Asks the server for a sign of life, for `until_silent`."""
        if not await self._answers("/server_info", within_s=within_s):
            raise Unavailable(f"{self._url}/server_info: no answer within {within_s:g} s")

    async def _answers(self, path: str, *, within_s: float = LOOK_S) -> bool:
        return await asyncio.to_thread(
            _ask, self._url + path, self._settings.admin_api_key, timeout_s=within_s
        )

    async def _hand_over(self) -> None:
        """Ends what did not end by itself, so that its tokens still reach whoever asked for them."""
        key = self._settings.admin_api_key
        if await asyncio.to_thread(_ask, self._url + "/abort_request", key, b'{"abort_all": true}'):
            await asyncio.sleep(ABORT_GRACE_S)

    async def _end(self, process: spawning.Process) -> None:
        """Kills all of its tree: it holds nothing that is worth a slow end, and a hung one knows no other."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        deadline = _now() + KILL_S
        while _lives(process.pid) and _now() < deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.sleep(0.05)


async def serve(settings: EngineSettings, stop: asyncio.Event) -> int:
    """Launches SGLang until `stop`; returns the exit status."""
    try:
        release = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        print(
            "milepost: engine.backend = 'sglang': SGLang is not installed; run: pip install sglang==0.5.21",
            file=sys.stderr,
        )
        return 2
    port = settings.port or _free_port(settings.host)
    try:
        arguments = sglang_options.arguments(settings, port=port, release=release)
    except InvalidArgument as error:
        print(f"milepost: engine: {error}", file=sys.stderr)
        return 2
    uuids = await gpus.uuids(sglang_options.gpu_indices(settings))
    launcher = Launcher(
        settings,
        module=MODULE,
        arguments=arguments,
        port=port,
        release=release,
        gpu_uuids=uuids,
        nccl_version=gpus.nccl_version(),
    )
    return await launcher.run(stop)


def _ask(url: str, key: str, body: bytes | None = None, *, timeout_s: float = LOOK_S) -> bool:
    """One call; False is no answer, a late one, or one that is not 200."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    if body is not None:
        headers["content-type"] = "application/json"
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            reply.read()
            return bool(reply.status == 200)
    except (OSError, HTTPException, urllib.error.URLError):
        return False


def _lives(group: int) -> bool:
    """Whether any process of a group runs; one that only waits to be reaped does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in ("Z", "X"):
            return True
    return False


def _free_port(host: str) -> int:
    """A port that nobody listens on; the server keeps it over its restarts."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _without_secrets(arguments: Sequence[str]) -> list[str]:
    shown = list(arguments)
    for i, word in enumerate(shown[:-1]):
        if word.endswith("api-key"):
            shown[i + 1] = "..."
    return shown


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()


def _now() -> float:
    return asyncio.get_running_loop().time()
