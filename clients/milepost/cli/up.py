"""`milepost up`: hands over to the supervisor, which lives beside the services."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from milepost.cli.services import missing_extra


def main(argv: Sequence[str]) -> int:
    """Runs the supervisor; returns its exit status."""
    try:
        command = importlib.import_module("milepost_common.up.command")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("milepost"):
            raise
        print(missing_extra("up", error.name or "?").replace("[up]", "[all]"), file=sys.stderr)
        return 1
    return command.main(argv)


def add(commands: Any, text: str) -> None:
    """Adds the help; the flags are those of the table [up]."""
    parser = commands.add_parser(
        "up", help=text, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of the run (default: milepost.toml)")
    parser.add_argument(
        "--run_dir", metavar="DIR", help="logs, up.json, checkpoints (default: runs/<run_id>)"
    )
    parser.add_argument("--engines", metavar="N", help="CPU engines to start (default: 1)")
    parser.add_argument("--feed", metavar="FILE", help="JSONL file of prompts to feed as well")
    parser.add_argument("--feed_epochs", metavar="N", help="how often (default: 1)")
    parser.add_argument("--no-trainer", action="store_true", help="everything but the trainer")
    parser.add_argument("--no-rollout", action="store_true", help="everything but the gateway")
    parser.add_argument("--ports", choices=("configured", "free"), help="take free ports of 127.0.0.1")
    parser.add_argument("--stay", action="store_true", help="go on when the trainer has finished")


_DESCRIPTION = """Starts buffer (with an embedded Redis), router, engines, rollout gateway and
trainer of one run as children of this process, each as soon as those it needs are ready. A child
that dies is started again on the same ports; one that dies five times before it is ready ends
everything. When the trainer has finished, or on Ctrl-C, all are stopped in order, the buffer last.

Every setting of the table [up] is a flag here; the services read their own tables of the same file.
Logs are in <run_dir>/logs, pids and addresses in <run_dir>/up.json.

exit status: 0 the run finished, or SIGTERM; 1 failed; 2 wrong settings; 130 Ctrl-C
"""
