"""Traces through the ledger: a prompt without one gets one, and each step of its way is told in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry import trace

from milepost import BufferClient
from milepost import tracing as client
from milepost import types as t
from milepost_buffer.buffer_servicer import NAME, BufferServicer, add_to_server
from milepost_common.server import GrpcServer
from milepost_common.telemetry import tracing
from spans import recording

THEIRS = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
AGAINST = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


@asynccontextmanager
async def serving(bench: Any) -> AsyncIterator[BufferClient]:
    """The bench's ledger over a socket."""
    async with GrpcServer(listen="127.0.0.1:0", grace_s=0.1) as server:
        server.add(add_to_server, BufferServicer(bench.ledger), NAME)
        await server.start()
        async with BufferClient(server.address) as buffer:
            yield buffer


async def put(buffer: BufferClient, run_id: str, *names: str, traceparent: str = "") -> t.PutPromptsResult:
    items = [
        t.PromptItem(prompt=t.Prompt(prompt_id=name, text="1+1=", traceparent=traceparent)) for name in names
    ]
    return await buffer.put_prompts(run_id, items=items)


async def lease(buffer: BufferClient, run_id: str, count: int) -> tuple[t.PromptLease, ...]:
    found = await buffer.lease_prompts(
        run_id, gateway_id="gw", instance_id="gw-1", max_prompts=count, max_wait_s=30
    )
    assert len(found.leases) == count
    return found.leases


async def test_a_prompt_is_put_leased_sealed_and_stepped_in_one_trace(bench: Any, make_group: Any) -> None:
    with recording() as finished:
        async with serving(bench) as buffer:
            await put(buffer, bench.run_id, "a", "b")
            leases = await lease(buffer, bench.run_id, 2)
            traces = {x.key.prompt_id: x.prompt.traceparent for x in leases}
            assert len({tracing.sampled(x) and x[3:35] for x in traces.values()}) == 2
            made = [make_group(x.key.prompt_id, x.attempt) for x in leases]
            groups = [
                replace(g, header=replace(g.header, traceparent=traces[g.header.prompt_id])) for g in made
            ]
            results = await buffer.put_groups(bench.run_id, groups=groups)
            assert {r.status for r in results} == {t.SealStatus.SEALED}
            step = await bench.lease_step(1)
        spans = finished()
    assert {g.prompt_id: g.traceparent for g in step.groups} == traces
    assert Counter(s.name for s in spans) == {"buffer.put": 2, "buffer.lease": 2, "buffer.seal": 2}
    for prompt_id, traceparent in traces.items():
        mine = [s for s in spans if s.attributes["milepost.prompt_id"] == prompt_id]
        assert {trace.format_trace_id(s.context.trace_id) for s in mine} == {traceparent[3:35]}
        root = next(s for s in mine if s.name == "buffer.put")
        assert root.parent is None
        assert client.traceparent_of(root.context) == traceparent
        assert {s.parent.span_id for s in mine if s is not root} == {root.context.span_id}


async def test_the_clients_trace_is_kept_and_is_no_part_of_the_content(bench: Any) -> None:
    with recording() as finished:
        async with serving(bench) as buffer:
            await put(buffer, bench.run_id, "a", traceparent=THEIRS)
            again = await put(buffer, bench.run_id, "a")
            assert (again.accepted, again.duplicates) == (1, 1)
            (held,) = await lease(buffer, bench.run_id, 1)
        first = finished()[0]
    assert held.prompt.traceparent == THEIRS
    assert trace.format_span_id(first.parent.span_id) == THEIRS[36:52]


async def test_prompts_join_the_span_that_is_active_at_the_client(bench: Any) -> None:
    with recording():
        async with serving(bench) as buffer:
            with tracing.span("application", begins=True) as span:
                await put(buffer, bench.run_id, "a")
            (held,) = await lease(buffer, bench.run_id, 1)
    assert held.prompt.traceparent == span.traceparent


@pytest.mark.parametrize("traceparent", ["", AGAINST])
async def test_what_is_not_sampled_is_kept_as_it_came_and_makes_no_spans(
    bench: Any, traceparent: str
) -> None:
    with recording(0.0) as finished:
        async with serving(bench) as buffer:
            await put(buffer, bench.run_id, "a", traceparent=traceparent)
            (held,) = await lease(buffer, bench.run_id, 1)
        assert not finished()
    assert held.prompt.traceparent == traceparent


async def test_prompts_that_find_no_credits_are_not_told(make_bench: Any) -> None:
    async with make_bench() as bench, serving(bench) as buffer:
        with recording() as finished:
            names = [f"p{i}" for i in range(200)]
            result = await put(buffer, bench.run_id, *names)
            assert result.accepted < 200
            assert len(finished()) == result.accepted
