"""The router's metrics: the fleet as it is, requests by how they ended, phases of transactions."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from milepost_common.metrics import Instrument
from milepost_router.metrics import PHASES, SPECS, FleetView, TransactionClock, TransactionMeter
from milepost_router.service import Router, running
from milepost_router.settings import EngineSettings, RouterSettings
from stack import until


def numbers(instruments: Any) -> dict[tuple[str, ...], Any]:
    """(name, label values ...) -> number."""
    return {(i.spec.name, *labels): value for i in instruments for labels, value in i.read()}


class Engine:
    """Answers probes well and /generate with the status that is asked for."""

    def __init__(self) -> None:
        self.held = asyncio.Event()
        self.go = asyncio.Event()
        self.up = asyncio.Event()
        self.up.set()

    async def generate(self, request: web.Request) -> web.Response:
        wanted = (await request.json())["status"]
        if wanted == "hold":
            self.held.set()
            await self.go.wait()
            wanted = 200
        return web.json_response({}, status=wanted)

    async def info(self, request: web.Request) -> web.Response:
        await self.up.wait()
        return web.json_response(
            {"engine": "milepost_engine", "version": "0.5.21", "weight_version": "default"}
        )


@asynccontextmanager
async def router_over(engine: Engine) -> AsyncIterator[tuple[Router, aiohttp.ClientSession]]:
    """A router without a ledger over one engine, and a client of it."""
    app = web.Application()
    app.router.add_post("/generate", engine.generate)
    for path in ("/health", "/model_info", "/server_info"):
        app.router.add_get(path, engine.info)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    settings = RouterSettings(
        listen="127.0.0.1:0",
        http_listen="127.0.0.1:0",
        buffer="",
        engines=(EngineSettings(url=f"http://127.0.0.1:{runner.addresses[0][1]}", id="one"),),
        request_retries=1,
        admit_wait_s=60.0,
        probe_timeout_s=30.0,
        connect_timeout_s=30.0,
    )
    try:
        async with (
            running(settings) as router,
            aiohttp.ClientSession(f"http://{router.http_address}") as http,
        ):
            yield router, http
    finally:
        await runner.cleanup()


async def test_requests_are_counted_by_how_they_ended() -> None:
    engine = Engine()
    async with router_over(engine) as (router, http):

        async def ask(status: int | str, **headers: str) -> int:
            named = {f"x-milepost-{k.replace('_', '-')}": v for k, v in headers.items()}
            async with http.post("/generate", json={"status": status}, headers=named) as reply:
                await reply.read()
                return reply.status

        assert [await ask(200), await ask(200), await ask(400), await ask(500)] == [200, 200, 400, 500]
        assert await ask(200, run="another", min_version="7") == 503
        assert await ask(200, deadline_ms="soon") == 400

        held = asyncio.create_task(ask("hold"))
        await asyncio.wait_for(engine.held.wait(), 30)
        during = numbers(router.instruments)
        engine.go.set()
        assert await held == 200
        after = numbers(router.instruments)

    def ended(outcome: str) -> Any:
        return after["milepost_proxy_requests", outcome]

    assert (ended("ok"), ended("refused"), ended("engine_error")) == (3, 1, 1)
    assert (ended("no_engine_fits"), ended("bad_header")) == (1, 1)
    assert after["milepost_proxy_retries", "servererror"] >= 1
    assert sum(after["milepost_proxy_request_seconds",].counts) == 6, "all but the one that never began"
    assert (during["milepost_proxy_in_flight",], after["milepost_proxy_in_flight",]) == (1, 0)
    assert (during["milepost_engine_in_flight", "one"], after["milepost_engine_in_flight", "one"]) == (1, 0)
    assert after["milepost_engine_state", "one", "serving"] == after["milepost_engines", "serving"] == 1
    assert after["milepost_engine_state", "one", "dead"] == after["milepost_engines", "dead"] == 0
    assert after["milepost_engine_transitions", "serving"] == 1
    assert after["milepost_engine_requests", "one"] > after["milepost_engine_failures", "one"] >= 1
    assert after["milepost_proxy_queued_seconds",] >= 0


async def test_a_request_that_waits_for_an_engine_is_seen_waiting() -> None:
    engine = Engine()
    engine.up.clear()
    async with router_over(engine) as (router, http):

        async def ask() -> int:
            async with http.post("/generate", json={"status": 200}) as reply:
                return reply.status

        async def queued() -> bool:
            return numbers(router.instruments)["milepost_proxy_queued",] == 1

        asking = asyncio.create_task(ask())
        await until("a request waits", queued, within_s=30)
        engine.up.set()
        assert await asyncio.wait_for(asking, 60) == 200
        got = numbers(router.instruments)
    assert got["milepost_proxy_queued",] == 0
    assert got["milepost_proxy_queued_seconds",] > 0


async def test_a_commit_shows_its_phases_versions_and_bytes(bench, tools) -> None:
    view = FleetView(bench.fleet, clock=lambda: 0.0)
    prepared = await bench.transactions.prepare(tools.request())
    await tools.transfer(bench, prepared)
    await tools.commit(bench, prepared)
    instruments: list[Instrument] = [*bench.transactions.meter.instruments, *view.instruments]
    got = numbers(instruments)
    assert (got["milepost_transactions", "committed"], got["milepost_transactions", "aborted"]) == (1, 0)
    assert [sum(got["milepost_transaction_seconds", phase].counts) for phase in PHASES] == [1] * 6
    assert got["milepost_transaction_bytes",] == 16
    for name in ("a", "b"):
        assert got["milepost_engine_weight_version", name, "run"] == 1
        assert got["milepost_engine_label_lag", name, "run"] == 0
    assert got["milepost_engine_transitions", "updating"] == 2

    bench.record("b").label, bench.record("a").label = 3, 1
    assert numbers(view.instruments)["milepost_engine_label_lag", "a", "run"] == 2


async def test_an_abort_counts_no_time_for_a_phase_that_did_not_end(bench, tools) -> None:
    prepared = await bench.transactions.prepare(tools.request())
    transaction = bench.transactions.find(prepared.transaction_id)
    await transaction.take(tools.bucket(prepared, 0))
    await bench.transactions.abort(prepared.transaction_id, term=1, reason="test")
    await transaction.abort("again")
    got = numbers(bench.transactions.meter.instruments)
    assert (got["milepost_transactions", "committed"], got["milepost_transactions", "aborted"]) == (0, 1)
    assert [sum(got["milepost_transaction_seconds", phase].counts) for phase in PHASES] == [1, 1, 0, 0, 0, 0]


def test_the_clock_gives_each_phase_its_own_time() -> None:
    now = [0.0]
    meter = TransactionMeter()
    clock = TransactionClock(meter, clock=lambda: now[0])
    lasted = dict(zip(PHASES, (1.0, 0.25, 20.0, 3.0, 0.5, 0.125), strict=True))
    for phase, following in itertools.pairwise(PHASES):
        now[0] += lasted[phase]
        clock.enter(following)
    now[0] += lasted[PHASES[-1]]
    clock.end("committed")
    totals = {labels[0]: value.total for labels, value in meter.seconds.read()}
    assert totals == pytest.approx(lasted)
    assert clock.in_words().startswith("prepare 1000.0 ms, pause 250.0 ms, transfer 20000.0 ms")
    assert clock.in_words().endswith("publish 125.0 ms")


def test_specs_are_distinct() -> None:
    assert len({s.name for s in SPECS}) == len(SPECS)
