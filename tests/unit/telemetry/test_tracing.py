"""Spans of services: who their parent is, when there are none, and what the client hands on."""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from milepost import tracing as client
from milepost_common.telemetry import tracing

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = SAMPLED[:-1] + "0"
RUBBISH = ["", "x", SAMPLED[:-1], "ff" + SAMPLED[2:], f"00-{'0' * 32}-b7ad6b7169203331-01", SAMPLED.upper()]


def attributes(span: Any) -> dict[str, Any]:
    """Of a span."""
    return dict(span.attributes or {})


def test_without_a_provider_nothing_is_made_and_nothing_imported() -> None:
    with tracing.span("a", parent=SAMPLED, begins=True, run_id="r") as span:
        span.set(outcome="x")
        assert client.active() == ""
    assert span is tracing.NOTHING
    assert (bool(span), span.traceparent, tracing.trace_id()) == (False, "", "")


def test_a_traceparent_is_the_parent(finished: Any) -> None:
    with tracing.span("a", parent=SAMPLED, run_id="r", prompt_id="", version=None, step=0) as span:
        assert span.traceparent[3:35] == tracing.trace_id() == SAMPLED[3:35]
    (made,) = finished()
    assert trace.format_span_id(made.parent.span_id) == SAMPLED[36:52]
    assert attributes(made) == {"milepost.run_id": "r", "milepost.step": 0}


def test_the_active_span_is_the_parent_across_tasks(finished: Any) -> None:
    async def child() -> None:
        await asyncio.sleep(0)
        with tracing.span("child"):
            tracing.annotate(outcome="done")

    async def main() -> None:
        with tracing.span("parent", begins=True):
            await asyncio.gather(child(), child())

    asyncio.run(main())
    one, two, parent = finished()
    assert one.parent.span_id == two.parent.span_id == parent.context.span_id
    assert attributes(one) == {"milepost.outcome": "done"}
    assert parent.parent is None


@pytest.mark.parametrize("parent", [*RUBBISH, NOT_SAMPLED])
def test_without_a_sampled_parent_there_is_no_span(finished: Any, parent: str) -> None:
    assert tracing.span("a", parent=parent) is tracing.NOTHING
    assert tracing.span("a") is tracing.NOTHING
    assert not tracing.sampled(parent)
    assert not finished()


@pytest.mark.parametrize("parent", RUBBISH)
def test_a_trace_begins_where_there_is_no_parent(finished: Any, parent: str) -> None:
    with tracing.span("a", parent=parent, begins=True) as span:
        assert tracing.sampled(span.traceparent)
    assert finished()[0].parent is None


def test_no_trace_begins_where_the_client_decided_against_it(finished: Any) -> None:
    assert tracing.span("a", parent=NOT_SAMPLED, begins=True) is tracing.NOTHING
    assert not finished()


def test_what_raises_is_told_and_raised(finished: Any) -> None:
    with pytest.raises(KeyError), tracing.span("a", begins=True):
        raise KeyError("x")
    status = finished()[0].status
    assert (status.status_code, status.description) == (trace.StatusCode.ERROR, "KeyError: 'x'")


def test_the_past_can_be_told(finished: Any) -> None:
    tracing.span("a", begins=True, start_ns=1_000).end(end_ns=3_000)
    assert (finished()[0].start_time, finished()[0].end_time) == (1_000, 3_000)


def test_tasks_started_apart_belong_to_no_trace(finished: Any) -> None:
    async def main() -> list[tuple[tuple[str, str], ...] | None]:
        async def metadata() -> tuple[tuple[str, str], ...] | None:
            return client.metadata()

        with tracing.span("a", begins=True):
            inside = asyncio.create_task(metadata())
            with tracing.apart():
                outside = asyncio.create_task(metadata())
            return [await inside, await outside]

    inside, outside = asyncio.run(main())
    assert inside is not None
    assert inside[0][1][3:35] == trace.format_trace_id(finished()[0].context.trace_id)
    assert outside is None


def test_the_ratio_is_of_traces_that_begin_here(start_tracing: Any) -> None:
    finished = start_tracing(0.25)
    for _ in range(2000):
        tracing.span("a", parent="", begins=True).end()
    assert 350 < len(finished()) < 650  # 500 and 7.7 standard deviations
    before = len(finished())
    for _ in range(100):
        tracing.span("b", parent=SAMPLED).end()
    assert len(finished()) == before + 100


def test_a_trace_linked_to_a_recorded_one_is_recorded(start_tracing: Any) -> None:
    finished = start_tracing(0.0)
    assert not tracing.span("a", parent="", begins=True)
    assert not tracing.span("a", parent="", begins=True, links=[NOT_SAMPLED, ""])
    tracing.span("step", parent="", begins=True, links=["", SAMPLED]).end()
    (made,) = finished()
    assert [trace.format_trace_id(link.context.trace_id) for link in made.links] == [SAMPLED[3:35]]


# ---- the client --------------------------------------------------------------------------------------------


def test_a_client_without_opentelemetry_hands_nothing_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    assert client.active() == ""
    assert client.metadata() is None
    span = client.begin("feed.put", run_id="r", prompt_id="p")
    assert span is client.NO_SPAN
    span.end("accepted")


def test_a_feeder_begins_a_trace_for_each_prompt(finished: Any) -> None:
    with tracing.span("application", begins=True) as around:
        spans = [client.begin("feed.put", run_id="r", prompt_id=p) for p in "ab"]
    for span in spans:
        span.end("accepted")
        span.end("not accepted")
    _, a, b = finished()
    assert len({a.context.trace_id, b.context.trace_id, int(around.trace_id, 16)}) == 3
    assert a.parent is None
    assert trace.format_trace_id(a.links[0].context.trace_id) == around.trace_id
    assert attributes(b) == {
        "milepost.run_id": "r",
        "milepost.prompt_id": "b",
        "milepost.outcome": "accepted",
    }


def test_a_decision_against_a_trace_travels_too(start_tracing: Any) -> None:
    start_tracing(0.0)
    traceparent = client.begin("feed.put", run_id="r", prompt_id="p").traceparent
    assert len(traceparent) == len(SAMPLED)
    assert not tracing.sampled(traceparent)


def test_spans_of_an_application_are_handed_on() -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("application")
    with tracer.start_as_current_span("nightly") as span:
        wanted = client.traceparent_of(span.get_span_context())
        assert client.active() == wanted
        assert client.metadata() == (("traceparent", wanted),)
    assert client.metadata() is None


@pytest.mark.parametrize("seed", range(20))
def test_contexts_are_written_as_they_are_read(finished: Any, seed: int) -> None:
    draw = random.Random(seed)
    context = trace.SpanContext(
        draw.getrandbits(128) or 1,
        draw.getrandbits(64) or 1,
        is_remote=True,
        trace_flags=trace.TraceFlags(1),
    )
    tracing.span("a", parent=client.traceparent_of(context)).end()
    made = finished()[-1]
    assert (made.parent.trace_id, made.parent.span_id) == (context.trace_id, context.span_id)
