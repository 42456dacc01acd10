"""Log lines of services: text for people, or JSON with what the line is about.

    with logs.about(run=run_id, prompt=prompt_id):
        log.warning("the reward failed")     # JSON: {"event": "the reward failed", "run": ..., "prompt": ...}

Code logs through the standard library alone. What a line is about is bound where the work happens, and holds
for tasks that are started there; it is read only where lines are JSON, and costs a look at a flag otherwise.

| key                            | meaning                                               |
|--------------------------------|-------------------------------------------------------|
| `timestamp`, `level`, `logger` | when (UTC), how bad, which module                     |
| `service`, `instance`          | who: the service, and its process                     |
| `event`                        | the line                                              |
| `exception`                    | stack of an error, where there is one                 |
| `run`, `prompt`, `version`, `step` | what it is about; only what is known              |
| `trace_id`                     | of the active span, where there is one                |
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any, Literal

from milepost_common.telemetry import tracing

LogFormat = Literal["text", "json"]

as_json = False
"""Lines are JSON: what they are about is kept."""

_ORDER = ("timestamp", "level", "service", "instance", "logger", "event")


def set_up(name: str, log_format: LogFormat) -> None:
    """Logs to stderr, one line an event; MILEPOST_LOG sets the level (default INFO)."""
    global as_json
    as_json = log_format == "json"
    handler = logging.StreamHandler(sys.stderr)
    text = f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(_json(name) if as_json else logging.Formatter(text))
    logging.basicConfig(level=os.environ.get("MILEPOST_LOG", "INFO").upper(), handlers=[handler], force=True)


def about(
    *, run: str = "", prompt: str = "", version: int | None = None, step: int | None = None
) -> AbstractContextManager[None]:
    """What lines of this block are about; what is left out stays as it was."""
    if not as_json:
        return contextlib.nullcontext()
    from structlog.contextvars import bound_contextvars

    given = {"run": run, "prompt": prompt, "version": version, "step": step}
    return bound_contextvars(**{key: value for key, value in given.items() if value not in (None, "")})


def _json(name: str) -> logging.Formatter:
    """structlog's formatter over records of the standard library."""
    import structlog

    instance = f"{name}-{os.getpid()}"

    def who(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"], event["instance"] = f"milepost-{name}", instance
        if trace_id := tracing.trace_id():
            event["trace_id"] = trace_id
        return event

    def in_order(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        first = {key: event.pop(key) for key in _ORDER if key in event}
        return {**first, **event}

    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            who,
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            in_order,
            structlog.processors.JSONRenderer(),
        ],
    )
