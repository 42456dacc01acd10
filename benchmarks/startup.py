"""Cold start of buffer, router and gateway: from the start of the process to health SERVING.

Wall-clock time, for that is what an operator waits for; CPU seconds of the process until then stand beside
it. The buffer starts its embedded Redis on an empty folder, the router knows one engine and a buffer, the
gateway has a buffer, a run and a tokenizer.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.children import START_S, child, python
from benchmarks.measure import CpuMeter, Row, Size, ratio_row
from benchmarks.simulation import RUN_ID, save_tokenizer
from milepost import BufferClient
from milepost import types as t

LIMIT_S = 3.0
POLL_S = 0.01
ANYWHERE = "127.0.0.1:0"
_SERVING = health_pb2.HealthCheckResponse.SERVING


async def measure(size: Size, folder: Path) -> list[Row]:
    """Each service, in turns."""
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    numbers = itertools.count()
    async with _neighbours(folder) as flags:
        for turn in range(size.runs + 1):
            for service, arguments in flags.items():
                seconds, used = await _start(service, arguments, folder / f"start-{next(numbers)}")
                if turn:  # the first start also reads the files from the disk
                    wall.setdefault(service, []).append(seconds)
                    cpu.setdefault(service, []).append(used)
    return [
        ratio_row(
            f"start_{service}",
            {"ours": runs, "reference": [LIMIT_S] * len(runs)},
            unit="s from start to SERVING",
            target=1.0,
            compared=f"{LIMIT_S:g} s",
            more={"cpu_s": round(median(cpu[service]), 3), "cpu_runs_s": cpu[service]},
        )
        for service, runs in wall.items()
    ]


@asynccontextmanager
async def _neighbours(folder: Path) -> AsyncGenerator[dict[str, tuple[str, ...]]]:
    """What the services need to serve, and the flags that tell them."""
    tokenizer = save_tokenizer(folder / "model")
    data = ("--data_dir", folder / "redis", "--listen", ANYWHERE, "--metrics_listen", ANYWHERE)
    async with (
        child("engine", *python("benchmarks.upstream", 1), folder=folder) as engine,
        child("neighbour", *python("milepost_buffer", "serve", *data), folder=folder) as buffer,
    ):
        url = await engine.ready(r"ready (\S+)")
        await buffer.ready()
        address = buffer.address("grpc")
        async with BufferClient(address) as client:
            await client.create_run(RUN_ID, config=t.RunConfig(reward="exact"))
        run = ("--buffer", address, "--run_id", RUN_ID, "--tokenizer", str(tokenizer))
        yield {
            "buffer": ("--data_dir", "redis"),
            "router": ("--buffer", address, "--engines", url, "--http_listen", ANYWHERE),
            "rollout": (*run, "--router_http", url, "--router", ""),
        }


async def _start(service: str, arguments: tuple[str, ...], folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds until it serves."""
    await asyncio.to_thread(folder.mkdir)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = ("--listen", address, "--metrics_listen", ANYWHERE, *arguments)
    started = time.monotonic()
    async with child(service, *python(f"milepost_{service}", "serve", *flags), folder=folder) as process:
        try:
            async with asyncio.timeout(START_S):
                await _serving(address)
        except TimeoutError:
            raise process.failed(f"not SERVING within {START_S:g} s") from None
        return time.monotonic() - started, CpuMeter.used_by(process.pid)


async def _serving(address: str) -> None:
    """Asks until it says so; its caller has a deadline."""
    options = [("grpc.initial_reconnect_backoff_ms", 10), ("grpc.max_reconnect_backoff_ms", 20)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
                if reply.status == _SERVING:
                    return
            except grpc.aio.AioRpcError:
                pass  # it does not listen yet
            await asyncio.sleep(POLL_S)
