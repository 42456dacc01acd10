"""How long requests get no token while weights are published, for `benchmarks.gpu`.

Streams run through the router, from a process of their own, so that nobody waits there for the trainer's
Python; it times each event of each. A decode step is the time between two events of one stream before the
publication. The gap is the longest time in which no stream got any, of those that fall into a publication:
from before its preparation until the trainer knows that it is served. Engines stand still for a moment at
other times too; the longest of these within a quarter of a second around it is told beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import uvloop

from benchmarks.children import child, python

STREAMS = 4
TOKENS = 3500
SETTLE_S = 0.7
MARGIN_S = 0.25
START_S = 30.0
LONGEST = 5


@dataclass(frozen=True)
class Gap:
    """One publication under load, in seconds.

    Attributes:
      step_s: a decode step.
      gap_s: the longest time without a token that falls into it.
      apart_s: the longest one shortly before or after it.
      longest: (when it began, how long it was) of the longest of all, from when the weights were there.
    """

    step_s: float
    gap_s: float
    apart_s: float
    longest: tuple[tuple[float, float], ...]


async def gap_around(http: str, run_id: str, publish: Callable[[], Awaitable[float]], *, folder: Path) -> Gap:
    """Runs streams, publishes in the middle of them, and looks at when tokens came.

    Args:
      http, run_id: of the router.
      publish: returns when the weights were there, on the monotonic clock.
      folder: for what the process of the streams writes.
    """
    out = folder / "arrivals.json"
    command = python("benchmarks.decoding", "--http", http, "--run", run_id, "--out", out)
    async with child("streams", *command, folder=folder) as streams:
        await streams.ready("streaming", within_s=START_S)
        begun = time.perf_counter()
        there = await publish()
        ended = time.perf_counter()
        await asyncio.sleep(SETTLE_S)
    try:
        arrivals = json.loads(await asyncio.to_thread(out.read_text))
    except FileNotFoundError:
        raise streams.failed("ended before it was told to") from None
    await asyncio.to_thread(out.unlink)
    return _judge(arrivals, begun, there, ended)


async def _streams(http: str, run_id: str) -> list[list[float]]:
    """When the events of each stream came, on the machine's monotonic clock; until SIGTERM."""
    arrivals: list[list[float]] = [[] for _ in range(STREAMS)]
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with httpx.AsyncClient(timeout=60.0) as client, asyncio.TaskGroup() as group:
        streams = [
            group.create_task(_stream(client, http, run_id, i, each)) for i, each in enumerate(arrivals)
        ]
        async with asyncio.timeout(START_S):
            while not all(len(each) > 20 for each in arrivals):  # noqa: ASYNC110  (it is their arrival)
                await asyncio.sleep(0.01)
        await asyncio.sleep(SETTLE_S)
        print("streaming", flush=True)
        await stopped.wait()
        for stream in streams:
            stream.cancel()
    return arrivals


async def _stream(
    client: httpx.AsyncClient, http: str, run_id: str, index: int, arrivals: list[float]
) -> None:
    sampling = {"max_new_tokens": TOKENS, "temperature": 1.0, "ignore_eos": True}
    body = {"input_ids": [3, 4, 5 + index], "sampling_params": sampling, "stream": True}
    headers = {"x-milepost-run": run_id}
    async with client.stream("POST", http + "/generate", json=body, headers=headers) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data:") and "[DONE]" not in line:
                arrivals.append(time.perf_counter())


def _judge(arrivals: list[list[float]], begun: float, there: float, ended: float) -> Gap:
    steps = [
        later - earlier
        for each in arrivals
        for earlier, later in itertools.pairwise(each)
        if begun - SETTLE_S < earlier and later < begun
    ]
    everything = sorted(x for each in arrivals for x in each)
    around = [x for x in everything if begun - MARGIN_S < x < ended + MARGIN_S]
    if len(steps) < 10 or not around or around[-1] < ended:
        raise RuntimeError("streams ended before or in the publication: give them more tokens")
    gaps = list(itertools.pairwise(around))
    within = [b - a for a, b in gaps if b > begun and a < ended]
    apart = [b - a for a, b in gaps if b <= begun or a >= ended]
    longest = sorted(gaps, key=lambda gap: gap[0] - gap[1])[:LONGEST]
    return Gap(
        step_s=median(steps),
        gap_s=max(within),
        apart_s=max(apart),
        longest=tuple((a - there, b - a) for a, b in longest),
    )


def main() -> None:
    """The process that has the streams."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding")
    parser.add_argument("--http", required=True, help="the router")
    parser.add_argument("--run", required=True)
    parser.add_argument("--out", type=Path, required=True, help="where it writes when events came")
    arguments = parser.parse_args()
    arguments.out.write_text(json.dumps(uvloop.run(_streams(arguments.http, arguments.run))))


if __name__ == "__main__":
    main()
