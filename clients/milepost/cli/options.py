"""Options that several subcommands share, and their defaults."""

from __future__ import annotations

import argparse

BUFFER = "127.0.0.1:7101"
ROUTER = "127.0.0.1:7102"
ROLLOUT = "127.0.0.1:7103"
TRAINER = "127.0.0.1:7104"


def add_run(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Adds `--run`."""
    parser.add_argument(
        "--run",
        dest="run_id",
        default="default",
        required=required,
        metavar="RUN",
        help="the run (default: %(default)s)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
