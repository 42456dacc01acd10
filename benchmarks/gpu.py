"""Publication to an engine on the trainer's GPU, beside one flat copy of the same bytes: `make gpu-bench`.

    make gpu-bench
    make gpu-bench BENCH_ARGS="--shapes 0.6b --runs 20"
    python -m benchmarks.gpu --device cpu --shapes tiny --runs 2    # it runs; its numbers mean nothing

For each shape: publications with our hook in the engine and by SGLang's own flattened_bucket, in turns with
flat copies, until the engine serves, and until the trainer has the answer that the ledger holds it as well;
the checksum, timed apart; the longest time without a decoded token around a publication, by pause mode; what
the router's log says of each publication. The same weights must hash alike after both. A table goes to
standard output, everything to `--out`. `--sglang` takes SGLang options as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import uvloop

from benchmarks.decoding import Gap, gap_around
from benchmarks.publication import RUN_ID, SHAPES, Fleet, Trainer, running

PAUSES = ("in_place", "retract")
WARM_UP = 2
GAPS = 3
CHECKSUMS = 3
COPY_SHARE, SMALL_S, GAP_STEPS = 0.5, 0.010, 3.0
"""What is aimed at: of a flat copy's speed at 8B; seconds at 0.6B; decode steps besides the copy."""


@asynccontextmanager
async def fleets(
    shapes: list[str], *, device: torch.device, options: dict[str, Any]
) -> AsyncGenerator[dict[str, Fleet]]:
    """One fleet a shape, started side by side; an engine at rest leaves the GPU to the others."""
    with tempfile.TemporaryDirectory(prefix="milepost-gpu-") as name:
        folders = {shape: Path(name) / shape for shape in shapes}
        try:
            async with AsyncExitStack() as stack:
                starting: dict[str, asyncio.Task[Fleet]] = {}
                async with asyncio.TaskGroup() as group:
                    for shape, folder in folders.items():
                        await asyncio.to_thread(folder.mkdir)
                        own = await stack.enter_async_context(AsyncExitStack())
                        fleet = running(shape, device=device, folder=folder, options=options)
                        starting[shape] = group.create_task(own.enter_async_context(fleet))
                yield {shape: task.result() for shape, task in starting.items()}
        except BaseException:
            print(await asyncio.to_thread(_logs, Path(name)), file=sys.stderr)
            raise


def _logs(folder: Path) -> str:
    return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in folder.glob("*/*.log"))


async def measure(shape: str, trainer: Trainer, runs: int) -> dict[str, Any]:
    """Everything about one shape."""
    flat = FlatCopy(trainer)
    found: dict[str, Any] = {"shape": shape, "bytes": trainer.size_bytes, "copies_s": flat.runs}
    for way in ("hook", "stock"):
        async with trainer.publisher(shared=way == "hook") as (publisher, rounds):
            for _ in range(runs + WARM_UP):
                await trainer.publish(publisher, rounds)
                if way == "hook" and trainer.on_gpu:
                    report = await trainer.read("milepost.report")
                    found["planned"], found["signalled"] = report["planned"], report["signalled"]
                    rounds.hook.append(report["seconds"])
                flat.measure()
        found[way] = {name: each[-runs:] for name, each in asdict(rounds).items()}
    flat.free()
    if trainer.on_gpu:
        found |= await _checksums(trainer)
    for pause in PAUSES:
        found[f"gap_{pause}"] = [asdict(gap) for gap in await _gaps(trainer, pause)]
    log = await asyncio.to_thread((trainer.fleet.folder / "router.log").read_text)
    found["publications"] = [line for line in log.splitlines() if "is served" in line]
    return found


async def _checksums(trainer: Trainer) -> dict[str, Any]:
    """How long a checksum takes, and whether the same weights hash alike by a signal and by stock."""
    async with trainer.publisher(shared=True) as (publisher, rounds):
        for _ in range(2):
            await trainer.publish(publisher, rounds)
    seconds: list[float] = []
    by_hook = ""
    for _ in range(CHECKSUMS):
        by_hook, taken = await trainer.checksum()
        seconds.append(taken)
    async with trainer.publisher(shared=False) as (publisher, rounds):
        await trainer.publish(publisher, rounds, still=True)
    by_stock, _ = await trainer.checksum()
    return {"checksum_s": seconds, "same_bytes": by_hook == by_stock}


async def _gaps(trainer: Trainer, pause: str) -> list[Gap]:
    gaps: list[Gap] = []
    fleet = trainer.fleet
    async with trainer.publisher(shared=True, pause_mode=pause) as (publisher, rounds):

        async def publish() -> float:
            return await trainer.publish(publisher, rounds)

        await publish()
        for _ in range(GAPS):
            gaps.append(await gap_around(fleet.http, RUN_ID, publish, folder=fleet.folder))
    return gaps


class FlatCopy:
    """One copy of as many bytes as the weights have, on the same device, in one call.

    Args:
      trainer: whose weights they are.

    Attributes:
      runs: seconds of each.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._source = torch.ones(trainer.size_bytes, dtype=torch.uint8, device=trainer.device)
        self._target = torch.empty_like(self._source)
        self.runs: list[float] = []

    def measure(self) -> None:
        """One more."""
        self._trainer.synchronize()
        begun = time.perf_counter()
        self._target.copy_(self._source)
        self._trainer.synchronize()
        self.runs.append(time.perf_counter() - begun)

    def free(self) -> None:
        """Lets go of its memory."""
        del self._source, self._target


# ---------------------------------------------------------------------------------------------- telling


def table(results: list[dict[str, Any]]) -> str:
    """What was measured, for a terminal: medians in milliseconds, ratios, and what was aimed at."""
    lines = [f"{'shape':6} {'what':34} {'ms':>9} {'of a flat copy':>15}  aim"]
    for found in results:
        copy_s = median(found["copies_s"])
        lines.append(_line(found["shape"], f"flat copy of {found['bytes'] / 1e9:.2f} GB", copy_s))
        for way in ("hook", "stock"):
            rounds = found[way]
            whole = median(rounds["whole"])
            ratio = copy_s / whole
            lines.append(
                _line(found["shape"], f"publication, {way}", whole, ratio, _aim(found, way, whole, ratio))
            )
            served = median(rounds["served"])
            verdict = _aim(found, way, served, copy_s / served)
            lines.append(_line(found["shape"], "  the engine serves", served, copy_s / served, verdict))
            for part in ("ahead", "transfer", "hook", "commit"):
                if rounds[part]:
                    lines.append(_line(found["shape"], f"  {part}", median(rounds[part])))
        if "checksum_s" in found:
            same = "the same after both" if found["same_bytes"] else "NOT THE SAME"
            lines.append(_line(found["shape"], f"checksum ({same})", median(found["checksum_s"])))
        for pause in PAUSES:
            lines.append(_gap_line(found, pause, copy_s))
    return "\n".join(lines)


def _line(shape: str, what: str, seconds: float, ratio: float | None = None, aim: str = "") -> str:
    return f"{shape:6} {what:34} {1e3 * seconds:9.2f} {'' if ratio is None else f'{ratio:.3f}':>15}  {aim}"


def _aim(found: dict[str, Any], way: str, whole: float, ratio: float) -> str:
    if way != "hook":
        return ""
    if found["shape"] == "8b":
        return f">= {COPY_SHARE:g}: {'met' if ratio >= COPY_SHARE else 'MISSED'}"
    if found["shape"] == "0.6b":
        return f"<= {1e3 * SMALL_S:g} ms: {'met' if whole <= SMALL_S else 'MISSED'}"
    return ""


def _gap_line(found: dict[str, Any], pause: str, copy_s: float) -> str:
    gaps = found[f"gap_{pause}"]
    step_s, longest_s = median(g["step_s"] for g in gaps), max(g["gap_s"] for g in gaps)
    steps = (longest_s - copy_s) / step_s
    aim = ""
    if pause == "in_place":
        aim = f"<= {GAP_STEPS:g} steps and the copy: {'met' if steps <= GAP_STEPS else 'MISSED'}"
    what = f"gap, {pause} (step {1e3 * step_s:.2f})"
    apart = f"apart from it up to {1e3 * max(g['apart_s'] for g in gaps):.2f} ms"
    return _line(found["shape"], what, longest_s, None, f"{steps:.1f} steps and the copy; {apart}  {aim}")


def about(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in ("torch", "sglang", "transformers", "grpcio"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": gpu,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "versions": versions,
    }


async def main_async(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Shape after shape; results are written after each."""
    device = torch.device(arguments.device)
    results: list[dict[str, Any]] = []
    shapes: list[str] = arguments.shapes.split(",")
    async with fleets(shapes, device=device, options=arguments.sglang) as started:
        for shape, fleet in started.items():
            print(f"measuring {shape} ...", file=sys.stderr, flush=True)
            trainer = await asyncio.to_thread(Trainer, shape, device, fleet)
            results.append(await measure(shape, trainer, arguments.runs))
            del trainer
            await asyncio.to_thread(write, arguments.out, {**about(device), "results": results})
            print(table(results[-1:]), flush=True)
    return results


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes what there is so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--shapes", default="0.6b,8b", help=f"of {', '.join(SHAPES)}, with commas")
    parser.add_argument("--runs", type=int, default=15, help="measured publications of each way")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--sglang", type=json.loads, default={}, help="SGLang options, as JSON")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu.json"))
    arguments = parser.parse_args()
    if unknown := [shape for shape in arguments.shapes.split(",") if shape not in SHAPES]:
        parser.error(f"--shapes {unknown[0]}: no such shape; choose from {', '.join(SHAPES)}")
    uvloop.run(main_async(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
