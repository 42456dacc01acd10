"""Spans reach a collector; one that is slow, dead or wrong costs a service a bounded time at its end."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from collector import collecting
from milepost_common.settings import TelemetrySettings, load_telemetry
from milepost_common.telemetry import export, tracing
from milepost_common.telemetry.export import FLUSH_S, OncePer, endpoint_of, exporting
from milepost_common.telemetry.resource import INSTANCE_ID

SLACK_S = 20.0
"""Far more than the end needs beside the flush, and far less than a flush without a deadline takes, in which
each batch has five seconds."""


@contextmanager
def silent_listener() -> Iterator[str]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_every_span_reaches_the_collector_by_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "FLUSH_S", 60.0)
    monkeypatch.setattr(export, "EXPORT_TIMEOUT_S", 60.0)
    with collecting() as collector:
        with exporting("router", TelemetrySettings(otlp_endpoint=collector.endpoint)):
            for i in range(1500):
                tracing.span("a", begins=True, step=i).end()
        assert sorted(s.attributes["step"] for s in collector.spans) == list(range(1500))
        assert {(s.service, s.instance) for s in collector.spans} == {("milepost-router", INSTANCE_ID)}
    assert not tracing.on


def test_spans_arrive_while_the_service_runs() -> None:
    with collecting() as collector:
        arrived = threading.Event()
        collector.on_spans = arrived.set
        with exporting("router", TelemetrySettings(otlp_endpoint=collector.endpoint)):
            tracing.span("a", begins=True).end()
            assert arrived.wait(60)


@pytest.mark.parametrize("dead", ["nobody", "silent"])
def test_a_dead_collector_costs_no_more_than_the_flush(dead: str) -> None:
    with silent_listener() as silent:
        endpoint = "http://127.0.0.1:1" if dead == "nobody" else silent
        with exporting("router", TelemetrySettings(otlp_endpoint=endpoint)):
            for _ in range(20_000):  # more than the queue takes
                tracing.span("a", begins=True).end()
            began = time.monotonic()
        assert time.monotonic() - began < FLUSH_S + SLACK_S


def test_without_an_endpoint_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    with exporting("router", TelemetrySettings()):
        assert not tracing.on


@pytest.mark.parametrize(
    ("settings", "environ", "wanted"),
    [
        ("http://a:1", {}, "http://a:1"),
        ("http://a:1", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:2"}, "http://a:1"),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:2"}, "http://b:2"),
        (
            "",
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:2", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:3"},
            "http://c:3",
        ),
        ("http://a:1", {"OTEL_SDK_DISABLED": "true"}, ""),
        ("", {}, ""),
    ],
)
def test_where_the_collector_is(
    monkeypatch: pytest.MonkeyPatch, settings: str, environ: dict[str, str], wanted: str
) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert endpoint_of(TelemetrySettings(otlp_endpoint=settings)) == wanted


def test_commands_read_the_table_from_the_environment() -> None:
    environ = {"MILEPOST_TELEMETRY__OTLP_ENDPOINT": "http://a:1", "MILEPOST_TELEMETRY__TRACE_RATIO": "0.5"}
    got = load_telemetry(environ=environ)
    assert got == TelemetrySettings(otlp_endpoint="http://a:1", trace_ratio=0.5)


def test_complaints_are_told_once_in_a_while() -> None:
    once = OncePer(3600.0)
    warning = logging.makeLogRecord({"levelno": logging.WARNING})
    error = logging.makeLogRecord({"levelno": logging.ERROR})
    assert [once.filter(r) for r in (warning, warning, error, error)] == [True, False, True, False]
