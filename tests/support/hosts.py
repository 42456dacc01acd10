"""A whole run, each service a process on a host of its own (`netns.Network`), with deadlines of seconds.

The test is the supervisor here, and it restarts nobody: no service exits because the network failed.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from milepost import BufferClient
from milepost.channel import NO_RETRY
from milepost.client import RolloutClient, RouterClient, TrainerClient
from milepost.types import Engine, EngineState, RolloutStatus, RunStats
from milepost_buffer.embedded import server_binary
from netns import Network, end
from stack import MILEPOST, until

RUN = "netns"
HOSTS = ("redis", "buffer", "router", "engine-0", "engine-1", "rollout", "trainer", "feeder")
READY_S = 180.0
LOOK_S = 20.0
"""Deadline of the test's own calls, which nothing cuts off."""
CALL_S = 2.0
"""Deadline of the services' calls to the buffer."""
REDIS_S = 1.5
WEIGHTS_S = 8.0
"""Deadline of a weight transaction."""
BROKEN_S = 10.0
"""A connection breaks after this long without a word: gRPC's, and those of `milepost_common.peers`."""
SMALL_MODEL_BUCKET = 16 * 1024


@dataclass(frozen=True, kw_only=True)
class Eyes:
    """Clients of the test, which reaches every host whatever is cut."""

    buffer: BufferClient
    router: RouterClient
    gateway: RolloutClient
    trainer: TrainerClient

    async def stats(self) -> RunStats:
        """Counts of the run."""
        return (await self.buffer.get_stats(RUN))[0]

    async def step(self) -> int:
        """Newest step of which the trainer knows that it is committed."""
        return (await self.trainer.get_trainer_status()).step

    async def published(self) -> int:
        """Label of the newest weights that the trainer knows to be published."""
        return (await self.trainer.get_trainer_status()).published_step

    async def rollout(self) -> RolloutStatus:
        """What the gateway does."""
        return await self.gateway.get_status()

    async def engine(self, engine_id: str) -> Engine:
        """An engine as the router sees it."""
        fleet = await self.router.list_engines(RUN)
        return next(e for e in fleet.engines if e.engine_id == engine_id)

    async def all_serve(self) -> bool:
        """Every engine serves."""
        fleet = await self.router.list_engines(RUN)
        return [e.state for e in fleet.engines] == [EngineState.SERVING] * 2


class Hosts:
    """The run's processes.

    Args:
      network: where they live.
      folder: of everything that they write.
      model: folder of the model.
      prompts: JSONL file that is fed.
    """

    def __init__(self, network: Network, *, folder: Path, model: Path, prompts: Path) -> None:
        self.network, self.folder = network, folder
        self._model, self._prompts = model, prompts
        self._config = folder / "milepost.toml"
        self._config.write_text(_toml(self._tables()))
        self.processes: dict[str, Popen[bytes]] = {}
        self.broken = ""
        """Since when the run is of no use; empty: it is."""

    def address(self, host: str, port: int) -> str:
        """`host:port` on a host."""
        return f"{self.network.address(host)}:{port}"

    def log(self, host: str) -> Path:
        """What a process said."""
        return self.folder / f"{host}.log"

    def said(self, host: str) -> str:
        """All of it."""
        return self.log(host).read_text(errors="replace")

    def start(self) -> None:
        """Starts everything, each once those before it are ready."""
        self._start("redis", server_binary(), *self._redis_flags())
        self._start_service("buffer")
        self._await_ready("buffer")
        self._start_service("router")
        self._await_ready("router")
        for engine in ("engine-0", "engine-1"):
            address = self.network.address(engine)
            flags = ("--engine_id", engine, "--host", address, "--advertise", f"http://{address}:30000")
            self._start_service("engine", *flags, host=engine)
        self._start_service("rollout")
        self._start_service("trainer")
        feed = ("feed", self._prompts, "--run", RUN, "--buffer", self.address("buffer", 7101))
        acknowledged = ("--acknowledged", self.folder / "acknowledged.jsonl")
        self._start("feeder", MILEPOST, *feed, *acknowledged, "--batch", "4", "--timeout-s", f"{CALL_S:g}")
        for host in ("engine-0", "engine-1", "rollout", "trainer"):
            self._await_ready(host)

    def _start_service(self, service: str, *flags: str, host: str = "") -> None:
        command = (sys.executable, "-m", f"milepost_{service}", "serve", "--config", self._config, *flags)
        self._start(host or service, *command)

    def _start(self, host: str, *command: str | Path) -> None:
        environ = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.processes[host] = self.network.spawn(host, command, log=self.log(host), environ=environ)

    def _await_ready(self, host: str) -> None:
        deadline = time.monotonic() + READY_S
        while not re.search(r"^(milepost )?\S+ ready ", self.said(host), re.MULTILINE):
            if self.processes[host].poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{host} is not ready\n{self.said(host)[-4000:]}")
            time.sleep(0.05)

    def stop_feeding(self) -> int:
        """Ctrl-C for the feeder; its exit status."""
        return end(self.processes.pop("feeder"), patience_s=READY_S)

    def ended(self) -> dict[str, int]:
        """Processes that are not there any more, and their exit status."""
        return {host: p.returncode for host, p in self.processes.items() if p.poll() is not None}

    def logs(self) -> str:
        """The end of each log, for failures."""
        return "\n".join(f"--- {host}\n{self.said(host)[-3000:]}" for host in HOSTS)

    @asynccontextmanager
    async def eyes(self) -> AsyncIterator[Eyes]:
        """Clients of the running test."""
        options: dict[str, Any] = {"timeout_s": LOOK_S, "retry": NO_RETRY}
        async with contextlib.AsyncExitStack() as stack:
            own = stack.enter_async_context
            yield Eyes(
                buffer=await own(BufferClient(self.address("buffer", 7101), **options)),
                router=await own(RouterClient(self.address("router", 7102), **options)),
                gateway=await own(RolloutClient(self.address("rollout", 7103), **options)),
                trainer=await own(TrainerClient(self.address("trainer", 7104), **options)),
            )

    # ------------------------------------------------------------------ settings

    def _redis_flags(self) -> list[str]:
        folder = self.folder / "redis"
        folder.mkdir()
        options = {
            "bind": self.network.address("redis"), "port": "6379", "protected-mode": "no", "dir": str(folder),
            "appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "save": "",
        }  # fmt: skip
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    def _tables(self) -> dict[str, dict[str, Any]]:
        at, model = self.address, str(self._model)
        buffer, router = at("buffer", 7101), at("router", 7102)
        return {
            "run": {
                "run_id": RUN, "groups_per_step": 4, "samples_per_prompt": 2, "max_staleness": 2,
                "lease_ttl_s": 5.0, "reward": "exact",
            },
            "run.sampling": {"temperature": 1.0, "max_new_tokens": 5},
            "buffer": {
                "listen": buffer, "redis_url": f"redis://{at('redis', 6379)}/0", "redis_wait_s": 20,
                "redis_timeout_s": REDIS_S,
            },
            "router": {
                "listen": router, "http_listen": at("router", 7202), "buffer": buffer,
                "ledger_timeout_s": CALL_S, "probe_interval_s": 0.5, "probe_timeout_s": 1.0,
                "engine_call_timeout_s": 2.0, "bucket_timeout_s": 2.0, "connect_timeout_s": 1.0,
                "transaction_timeout_s": WEIGHTS_S, "commit_wait_s": 3.0, "quarantine_max_s": 4.0,
                "admit_wait_s": 5.0, "heartbeat_interval_s": 1.0,
            },
            "engine": {
                "model": model, "run_id": RUN, "router": router, "port": 30000,
                "group_timeout_s": 2.0, "transfer_timeout_s": 2.0,
            },
            "rollout": {
                "listen": at("rollout", 7103), "buffer": buffer, "router": router, "run_id": RUN,
                "router_http": f"http://{at('router', 7202)}", "tokenizer": model, "gateway_id": "gateway",
                "ledger_timeout_s": CALL_S, "reward_workers": 1,
            },
            "trainer": {
                "listen": at("trainer", 7104), "buffer": buffer, "router": router, "model_dir": model,
                "ledger_timeout_s": CALL_S, "lease_wait_s": 2.0, "export_dir": str(self.folder / "final"),
            },
            "trainer.checkpoint": {"dir": str(self.folder / "checkpoints"), "every": 25},
            "trainer.metrics": {"dir": str(self.folder), "tensorboard": False},
            "trainer.publish": {
                "transport": "gloo", "master_address": self.network.address("trainer"),
                "bucket_bytes": SMALL_MODEL_BUCKET, "timeout_s": WEIGHTS_S, "retry_delay_s": 0.5,
            },
        }  # fmt: skip


def _toml(tables: dict[str, dict[str, Any]]) -> str:
    lines: list[str] = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


async def goes_on(eyes: Eyes, *, within_s: float, steps: int = 2) -> None:
    """The run commits that many more steps, and publishes weights that are newer than now."""
    at = await until("the trainer answers", eyes.trainer.get_trainer_status, within_s=READY_S)

    async def moved() -> bool:
        now = await eyes.trainer.get_trainer_status()
        return now.step >= at.step + steps and now.published_step > at.published_step

    await until(f"{steps} steps after {at.step}, published {at.published_step}", moved, within_s=within_s)
