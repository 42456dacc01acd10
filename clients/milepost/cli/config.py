"""`milepost config`: hands over to the catalogue of settings, which lives beside the services."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from milepost.cli.services import missing_extra


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    try:
        command = importlib.import_module("milepost_common.config_command")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("milepost"):
            raise
        print(missing_extra("common", error.name or "?"), file=sys.stderr)
        return 1
    return command.main(argv)


def add(commands: Any, text: str) -> None:
    """Adds nothing but a name: the command line is the catalogue's own."""
    commands.add_parser("config", help=text, add_help=False)
