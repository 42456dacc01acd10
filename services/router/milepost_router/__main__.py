"""Starts the router: python -m milepost_router serve --config milepost.toml [--listen host:port ...]"""

from __future__ import annotations

import sys

from milepost.errors import InvalidArgument, MilepostError
from milepost_common.process import run
from milepost_common.settings import load_or_exit
from milepost_router.service import serve
from milepost_router.settings import RouterSettings


def main(argv: list[str]) -> int:
    """Runs the command line."""
    if not argv or argv[0] != "serve":
        print("usage: python -m milepost_router serve [--config FILE] [--key value ...]", file=sys.stderr)
        return 2
    settings = load_or_exit(RouterSettings, argv[1:])
    try:
        return run("router", lambda stop: serve(settings, stop), telemetry=settings.telemetry)
    except MilepostError as error:
        print(f"milepost router: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgument) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
