"""Options that several subcommands share, and where a service is reached when nobody says so.

A command asks, in this order: its flag (`--buffer host:port`), the `up.json` of a `milepost up` that is
running the run (`runs/<run>/up.json`, or `--run-dir`), the service's default port on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milepost.channel import RetryPolicy, check_address
from milepost.errors import MilepostError, Unavailable

_RUN_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
PATIENCE = RetryPolicy(retry_for_s=5.0)
DEFAULTS: Mapping[str, str] = {
    "buffer": "127.0.0.1:7101",
    "router": "127.0.0.1:7102",
    "rollout": "127.0.0.1:7103",
    "trainer": "127.0.0.1:7104",
}


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds `--run` and `--run-dir`."""
    parser.add_argument(
        "--run",
        dest="run_id",
        type=_run_name,
        default="default",
        metavar="RUN",
        help="the run (default: %(default)s)",
    )
    parser.add_argument(
        "--run-dir", default="", metavar="DIR", help="of a `milepost up`, for addresses (default: runs/RUN)"
    )


def _run_name(value: str) -> str:
    """A name that a run can have; empty: none."""
    if value and not _RUN_NAME.fullmatch(value):
        raise argparse.ArgumentTypeError(f"{value!r}: no run is called so; use 1 to 128 of A-Z a-z 0-9 . _ -")
    return value


def add_address(parser: argparse.ArgumentParser, *services: str) -> None:
    """Adds `--buffer`, `--router` and so on."""
    for service in services:
        text = f"the {service} (default: as `milepost up` of that run says, else {DEFAULTS[service]})"
        parser.add_argument(f"--{service}", default="", metavar="HOST:PORT", help=text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def address(options: argparse.Namespace, service: str) -> str:
    """Where a service is reached.

    Raises:
      InvalidArgument: its flag is not `host:port`.
    """
    flag = str(getattr(options, service, "") or "")
    if flag:
        check_address(f"--{service}", flag)
    run_dir = Path(options.run_dir or f"runs/{options.run_id or 'default'}")
    return flag or _from_up(run_dir, service) or DEFAULTS[service]


def _from_up(run_dir: Path, service: str) -> str:
    """The service's address in `up.json`, if its supervisor lives."""
    try:
        state: Mapping[str, Any] = json.loads((run_dir / "up.json").read_text(encoding="utf-8"))
        os.kill(state["pid"], 0)
        return str(state["services"][service]["addresses"]["grpc"])
    except PermissionError:  # it lives, under another user
        return ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def in_words(error: MilepostError, *, where: str = "") -> str:
    """What an error says, on one line; a service that is not there is named without grpc's history of it."""
    text = " ".join(str(error).split())
    refused = re.search(r"(?:ipv4:|ipv6:)?(\S+?): Failed to connect", text)
    if isinstance(error, Unavailable) and (refused or "all backends" in text):
        who = where or (refused[1] if refused else "the service")
        return f"{who} does not answer; is it running, and is this where it listens?"
    return text
