"""`python -m milepost_rollout serve --config milepost.toml [--key value ...]`: runs the rollout gateway."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from milepost_common.process import run
from milepost_common.settings import load_or_exit
from milepost_rollout.service import serve
from milepost_rollout.settings import RolloutSettings


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    if not argv or argv[0] != "serve":
        print("usage: python -m milepost_rollout serve [--config FILE] [--key value ...]", file=sys.stderr)
        return 2
    settings = load_or_exit(RolloutSettings, argv[1:])
    return run(
        "rollout",
        lambda stop: serve(settings, stop),
        telemetry=settings.telemetry,
        stop_deadline_s=settings.drain_s + 15.0,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
