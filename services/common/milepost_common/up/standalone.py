"""A router and a gateway for the length of one command: rollouts without a run, a buffer or a Redis.

    engines (given, or one started here) <- router <- gateway <- whoever asks for the address

Everything listens on free ports of 127.0.0.1, and is gone when the context is left.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from milepost.errors import Unavailable
from milepost_common.up.policy import RestartPolicy
from milepost_common.up.spec import Addresses, ChildSpec
from milepost_common.up.supervisor import Report, Supervisor

_FREE = "127.0.0.1:0"
_UNMETERED = ("--metrics_listen", "")


@asynccontextmanager
async def standalone_gateway(
    *, engines: Sequence[str], model: str = "", tokenizer: str = "", report: Report, config: str = ""
) -> AsyncGenerator[str]:
    """Starts what is needed and yields the gateway's `host:port`.

    Args:
      engines: base URLs of engines that run already.
      model: folder of a model that a CPU engine shall serve.
      tokenizer: folder of the tokenizer; empty: `model`'s.
      report: told of each change, in one line.
      config: TOML file that the services read as well; empty: none.

    Raises:
      Unavailable: one of them did not get ready; its log was reported.
    """
    shared = ["--config", config] if config else []
    specs = [_router(engines, own=bool(model), shared=shared), _gateway(tokenizer or model, shared=shared)]
    specs += [_engine(model, shared=shared)] if model else []
    with tempfile.TemporaryDirectory(prefix="milepost-rollout-") as folder:
        supervisor = Supervisor(specs, run_dir=Path(folder), policy=RestartPolicy(), report=report)
        running = asyncio.create_task(supervisor.run(), name="standalone")
        ready = asyncio.create_task(supervisor.ready("rollout"))
        try:
            await asyncio.wait((running, ready), return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise Unavailable("router and gateway did not get ready; see the lines above")
            yield (await ready)["grpc"]
        finally:
            ready.cancel()
            supervisor.interrupt()
            await running


def _engine(model: str, *, shared: list[str]) -> ChildSpec:
    def command(at: Addresses) -> list[str]:
        port = at["engine"]["http"].rpartition(":")[2] if at["engine"] else "0"
        head = [sys.executable, "-m", "milepost_engine", "serve", *shared]
        return [*head, "--model", model, "--port", port, *_UNMETERED]

    return ChildSpec(name="engine", command=command, stop_rank=1)


def _router(engines: Sequence[str], *, own: bool, shared: list[str]) -> ChildSpec:
    def command(at: Addresses) -> list[str]:
        urls = [*engines, *([f"http://{at['engine']['http']}"] if own else [])]
        listen = [
            "--listen",
            at["router"].get("grpc", _FREE),
            "--http_listen",
            at["router"].get("http", _FREE),
            *_UNMETERED,
        ]
        head = [sys.executable, "-m", "milepost_router", "serve", *shared]
        return [*head, "--buffer", "", "--engines", ",".join(urls), *listen]

    return ChildSpec(name="router", command=command, needs=("engine",) if own else (), stop_rank=2)


def _gateway(tokenizer: str, *, shared: list[str]) -> ChildSpec:
    def command(at: Addresses) -> list[str]:
        router = at["router"]
        wires = ["--router", router["grpc"], "--router_http", f"http://{router['http']}"]
        alone = ["--buffer", "", "--run_id", ""]
        own = ["--tokenizer", tokenizer, "--listen", at["rollout"].get("grpc", _FREE), *_UNMETERED]
        return [sys.executable, "-m", "milepost_rollout", "serve", *shared, *alone, *wires, *own]

    return ChildSpec(name="rollout", command=command, needs=("router",), stop_rank=0)
