"""Runs one engine: `python -m milepost_engine serve --model DIR --port 30000`.

Prints `engine ready http://host:port model=... dialect=...` once it serves; with `--router` it registers
there under its `advertise` URL and leaves before it stops. SIGTERM ends live requests with `finish_reason`
abort and the process within `shutdown_timeout_s`. Exit status: 0 stopped, 1 the scheduler died, 2 bad
settings or a model that cannot be served.

`--backend sglang` launches SGLang and keeps it alive; see `launcher`. That way no torch is loaded here.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is loaded; torch.set_num_threads rules afterwards
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from milepost_common import process
from milepost_engine.settings import EngineSettings, from_command_line


def main(argv: Sequence[str] | None = None) -> int:
    """Reads settings and serves; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    settings = from_command_line(args[1:] if args[:1] == ["serve"] else args)

    async def until(stop: asyncio.Event) -> int:
        return await _serve(settings, stop)

    return process.run(
        "engine", until, telemetry=settings.telemetry, stop_deadline_s=settings.shutdown_timeout_s
    )


async def _serve(settings: EngineSettings, stop: asyncio.Event) -> int:
    if settings.backend == "sglang":
        from milepost_engine import launcher

        return await launcher.serve(settings, stop)
    from milepost_engine import cpu_server

    return await cpu_server.serve(settings, stop)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A collective that was given up may hold one of gloo's threads until its timeout: do not wait for it.
    os._exit(status)
