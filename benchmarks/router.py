"""CPU of the router for a request, beside sglang-router with its policy round_robin.

    32 connections ──> milepost_router, or sglang-router ──> two engines in one process (benchmarks.upstream)

The same engines, the same load, in turns; CPU of the router's processes alone. Every reply is compared with
what the engine sent.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.children import Child, child, python
from benchmarks.load import Load, WrongReply
from benchmarks.measure import CpuMeter, Row, Side, Size, ratio_row, take_turns
from benchmarks.upstream import reply_body, request_body

TARGET = 0.75
CONNECTIONS = 32
REQUESTS_SMALL, REQUESTS_LARGE = 10_000, 5_000
RUN_S = 60.0
ANYWHERE = "127.0.0.1:0"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A router that answers, and its process."""

    process: Child
    url: str


async def measure(size: Size, folder: Path) -> list[Row]:
    """Small replies and replies of 64 KiB."""
    async with (
        child("engines", *python("benchmarks.upstream", 2), folder=folder) as engines,
        _ours(engines_url := (await engines.ready(r"ready (\S+)")).split(","), folder) as ours,
        _sglang(engines_url, folder) as sglang,
    ):
        rows: list[Row] = []
        for name, large, full in (
            ("router_small", False, REQUESTS_SMALL),
            ("router_64k", True, REQUESTS_LARGE),
        ):
            count = size.of(full, least=200)
            runs = await take_turns(
                size.runs,
                ours=_side(ours, large=large, count=count),
                reference=_side(sglang, large=large, count=count),
            )
            more = {"requests_per_run": count, "connections": CONNECTIONS}
            compared = "sglang-router 0.3.2, round_robin"
            unit = "us of CPU per request"
            rows.append(ratio_row(name, runs, unit=unit, target=TARGET, compared=compared, more=more))
        return rows


def _side(router: Served, *, large: bool, count: int) -> Side:
    load = Load(f"{router.url}/generate", body=request_body(large=large), expected=reply_body(large=large))

    async def run() -> float:
        meter = CpuMeter(router.process.pid)
        await load.run(count, num_connections=CONNECTIONS, within_s=RUN_S)
        return meter.seconds() / count * 1e6

    return run


@asynccontextmanager
async def _ours(engines: list[str], folder: Path) -> AsyncGenerator[Served]:
    flags = (
        "--listen",
        "127.0.0.1:0",
        "--http_listen",
        "127.0.0.1:0",
        "--buffer",
        "",
        "--engines",
        ",".join(engines),
    )
    async with child("milepost_router", *python("milepost_router", "serve", *flags), folder=folder) as router:
        await router.ready()
        served = Served(process=router, url=f"http://{router.address('http')}")
        await _answers(served)
        yield served


@asynccontextmanager
async def _sglang(engines: list[str], folder: Path) -> AsyncGenerator[Served]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ("--host", "127.0.0.1", "--port", port, "--policy", "round_robin", "--log-level", "error")
    command = python("sglang_router.launch_router", *flags, "--worker-urls", *engines)
    async with child("sglang_router", *command, folder=folder) as router:
        served = Served(process=router, url=f"http://127.0.0.1:{port}")
        await _answers(served)
        yield served


async def _answers(router: Served, *, within_s: float = 120.0) -> None:
    """Waits until the router passes requests on to its engines."""
    load = Load(f"{router.url}/generate", body=request_body(large=False), expected=reply_body(large=False))
    why: Exception | None = None
    try:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    await load.run(16, num_connections=1, within_s=30.0)
                    return
                except (OSError, WrongReply) as error:
                    why = error
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise router.process.failed(f"no right answer within {within_s:g} s: {why}") from None
