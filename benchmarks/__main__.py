"""Runs the benchmarks: every row beside its reference, in one run; writes results.json and prints a table.

    make bench
    make bench BENCH_ARGS="--only router"          # router, buffer, wire, startup, loop; several with commas

Exit status: 0 all targets met, 1 one was missed, 2 a benchmark could not be measured. `--smallest` does as
little as shows that everything runs; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import uvloop

from benchmarks import buffer, loop, report, router, startup, wire
from benchmarks.measure import Row, Size
from milepost_common.process import tune_malloc

BENCHMARKS: Mapping[str, Callable[[Size, Path], Awaitable[list[Row]]]] = {
    "wire": wire.measure,
    "buffer": buffer.measure,
    "router": router.measure,
    "startup": startup.measure,
    "loop": loop.measure,
}
DEADLINE_S = 600.0
MET, MISSED, BROKEN = 0, 1, 2


async def measure(names: list[str], size: Size, out: Path) -> tuple[list[Row], list[str]]:
    """The rows of the benchmarks, and what went wrong with those that could not be measured.

    Results are written after each benchmark, so that a run that is broken off leaves what it has.
    """
    rows: list[Row] = []
    problems: list[str] = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix=f"milepost-bench-{name}-") as folder:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            try:
                async with asyncio.timeout(DEADLINE_S):
                    rows += await BENCHMARKS[name](size, Path(folder))
            except Exception as error:  # the other benchmarks are measured all the same
                problems.append(f"{name}: {type(error).__name__}: {error}")
        report.write(out, rows, size=size)
    return rows, problems


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="benchmarks to run, with commas")
    parser.add_argument("--runs", type=int, default=5, help="measured runs of each side")
    parser.add_argument("--smallest", action="store_true", help="one small run of each side")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/results.json"))
    arguments = parser.parse_args()
    names: list[str] = arguments.only.split(",")
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"--only {unknown[0]}: no such benchmark; choose from {', '.join(BENCHMARKS)}")
    size = Size(runs=1, scale=0.02) if arguments.smallest else Size(runs=arguments.runs)
    tune_malloc()
    rows, problems = uvloop.run(measure(names, size, arguments.out))
    print(report.table(rows))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return BROKEN
    return MET if all(row.met for row in rows) else MISSED


if __name__ == "__main__":
    sys.exit(main())
