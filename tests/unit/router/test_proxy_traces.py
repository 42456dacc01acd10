"""Requests that pass through a real router: whose trace is told, and what the engine hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from opentelemetry import trace

from milepost import tracing as client
from milepost_router.service import running
from milepost_router.settings import EngineSettings, RouterSettings
from spans import recording

DEADLINE_S = 60.0
THEIRS = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
AGAINST = THEIRS[:-1] + "0"


@asynccontextmanager
async def router_of(*engines: Any) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a router over fake engines, once all serve."""
    known = tuple(EngineSettings(id=e.name, url=e.url) for e in engines)
    settings = RouterSettings(
        listen="127.0.0.1:0",
        http_listen="127.0.0.1:0",
        buffer="",
        engines=known,
        probe_interval_s=0.05,
        probe_timeout_s=30.0,
        connect_timeout_s=30.0,
    )
    async with running(settings) as router, asyncio.timeout(DEADLINE_S):
        while any(e.state.name != "SERVING" for e in router.fleet):  # noqa: ASYNC110 (it has no event)
            await asyncio.sleep(0.005)
        async with aiohttp.ClientSession(f"http://{router.http_address}") as session:
            yield session


@pytest.fixture
async def engine(fake_engine: Any) -> Any:
    """An engine that answers /generate with the headers that it got."""
    fake = await fake_engine("a")

    async def echo(request: web.Request, body: Any) -> web.Response:
        return web.json_response(dict(request.headers))

    fake.reactions["generate"] = echo
    return fake


async def ask(session: aiohttp.ClientSession, traceparent: str = "") -> dict[str, str]:
    """The headers that the engine got, in small letters."""
    headers = {"traceparent": traceparent} if traceparent else {}
    async with session.post("/generate", json={}, headers={**headers, "x-other": THEIRS}) as reply:
        return {name.lower(): value for name, value in (await reply.json()).items()}


async def test_the_engine_is_a_child_of_the_router_and_the_router_of_its_client(engine: Any) -> None:
    with recording() as finished:
        async with router_of(engine) as session:
            heard = await ask(session, THEIRS)
        (made,) = finished()
    assert trace.format_span_id(made.parent.span_id) == THEIRS[36:52]
    assert heard["traceparent"] == client.traceparent_of(made.context)
    assert heard["x-other"] == THEIRS
    assert dict(made.attributes) == {
        "milepost.path": "/generate",
        "milepost.engine_id": "a",
        "milepost.version": 0,
        "milepost.label": 0,
        "milepost.outcome": "ok",
    }


@pytest.mark.parametrize("traceparent", ["", AGAINST, "rubbish"])
async def test_requests_without_a_recorded_trace_pass_as_they_came(engine: Any, traceparent: str) -> None:
    with recording() as finished:
        async with router_of(engine) as session:
            heard = await ask(session, traceparent)
        assert not finished()
    assert heard.get("traceparent", "") == traceparent


async def test_without_tracing_the_context_goes_on_to_the_engine(engine: Any) -> None:
    async with router_of(engine) as session:
        assert (await ask(session, THEIRS))["traceparent"] == THEIRS


async def test_the_engine_that_answered_at_last_is_told(engine: Any, fake_engine: Any) -> None:
    broken = await fake_engine("b")
    broken.break_down("generate")
    with recording() as finished:
        async with router_of(broken, engine) as session:
            for _ in range(4):
                await ask(session, THEIRS)
        spans = finished()
    assert len(spans) == 4
    assert {s.attributes["milepost.engine_id"] for s in spans} == {"a"}
    assert "generate" in broken.calls
