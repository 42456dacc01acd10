"""Log lines of a service: text as ever, or JSON that says what a line is about."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from milepost_common.telemetry import logs, tracing

log = logging.getLogger("milepost_test.logs")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Puts the root logger back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logs.as_json = False


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Those of this test: threads that another one left behind may still complain."""
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    return [line for line in told if line["logger"] == log.name]


def test_json_lines_carry_what_they_are_about(capsys: pytest.CaptureFixture[str], finished: Any) -> None:
    logs.set_up("rollout", "json")
    with (
        logs.about(run="r", prompt="p", version=3),
        tracing.span("gateway.rollout", begins=True) as span,
        logs.about(step=0),
    ):
        log.warning("prompt %r: %s", "p", "ä\n")
    log.info("after")
    inside, after = lines(capsys)
    assert {k: inside[k] for k in ("run", "prompt", "version", "step", "trace_id")} == {
        "run": "r",
        "prompt": "p",
        "version": 3,
        "step": 0,
        "trace_id": span.trace_id,
    }
    assert (inside["level"], inside["service"], inside["logger"], inside["event"]) == (
        "warning",
        "milepost-rollout",
        "milepost_test.logs",
        "prompt 'p': ä\n",
    )
    assert inside["timestamp"].endswith("Z")
    assert not {"run", "prompt", "version", "step", "trace_id"} & set(after)


def test_tasks_keep_what_they_were_started_about(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("rollout", "json")

    async def roll(prompt: str) -> None:
        with logs.about(prompt=prompt):
            await asyncio.sleep(0)
            log.info("done")

    async def main() -> None:
        with logs.about(run="r"):
            tasks = [asyncio.create_task(roll(p)) for p in "ab"]
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert [(x["run"], x["prompt"]) for x in lines(capsys)] == [("r", "a"), ("r", "b")]


def test_errors_bring_their_stack(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("buffer", "json")
    try:
        raise KeyError("x")
    except KeyError:
        log.exception("failed")
    (line,) = lines(capsys)
    assert "KeyError: 'x'" in line["exception"]
    assert "Traceback" in line["exception"]


def test_text_is_one_line_and_binds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("buffer", "text")
    with logs.about(run="r"):
        log.info("ledger on %s", "redis")
    line = capsys.readouterr().err
    assert line.endswith(" buffer INFO milepost_test.logs: ledger on redis\n")
    assert "run" not in line


def test_text_needs_neither_structlog_nor_opentelemetry() -> None:
    code = """
import sys
from milepost_common.process import set_up_logging
from milepost_common.telemetry import logs, tracing
set_up_logging("x")
with logs.about(run="r"), tracing.span("a", begins=True):
    pass
print([m for m in ("structlog", "opentelemetry", "pydantic") if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
