"""Measure the trainer's step and the plain loop's on the same sequences, one after the other.

    milepost trainer bench --model_dir qwen3-0.6b --compute_dtype bfloat16 [--nproc 2] [--bench.json_file F]

The trainer's loop is the one of `milepost trainer serve`: learner, packing, backend and optimizer as the
settings say, without buffer, engines and publication. A step takes groups that are packed already, as they
are in a run, where that happens beside the step before; it ends when the device has done all of its work,
the optimizer's included. The first updates pay for compilation and are told apart. With several ranks the
plain loop, which knows one, is left out.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from milepost_trainer.batch import MicroBatch
from milepost_trainer.bench.plain import PlainLoop
from milepost_trainer.bench.shapes import Arithmetic, arithmetic, load_config, model_folder, peak_tflops
from milepost_trainer.bench.workload import Workload, draw
from milepost_trainer.learner import Learner
from milepost_trainer.objectives.build import build_objective
from milepost_trainer.plan import StepPlan
from milepost_trainer.policy import meta_lm
from milepost_trainer.prepare import Preparer
from milepost_trainer.service import build_learner
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.world import World, leave

_GIB = 1024**3
_HALVINGS = 4  # of the plain loop's micro-batches, before it counts as not fitting at all


@dataclass(frozen=True)
class Result:
    """One loop, measured.

    Attributes:
        loop: "trainer" or "plain".
        tokens_per_s: fed tokens of all ranks, median of the steps that count.
        step_s: seconds of each step that counts.
        first_step_s: of the first one, compilation included.
        num_tokens: fed by all ranks, of each step that counts.
        num_micro_batches: of a rank, likewise.
        micro_batch_tokens: budget of one.
        tflops: TFLOP/s of one rank by 6 N T.
        mfu: the same over the device's peak; 0 where that is not known.
        mfu_with_attention: by 6 N T and attention.
        peak_gib: most memory allocated on rank 0's device while steps ran; 0 on the CPU.
        losses: of every update, the first included.
        grad_norms: likewise.
    """

    loop: str
    tokens_per_s: float
    step_s: list[float]
    first_step_s: float
    num_tokens: list[int]
    num_micro_batches: list[int]
    micro_batch_tokens: int
    tflops: float
    mfu: float
    mfu_with_attention: float
    peak_gib: float
    losses: list[float]
    grad_norms: list[float]


@dataclass
class Loop:
    """One way of training, as the measurement drives it: `stage` is not timed, `update` is."""

    name: str
    stage: Callable[[int], Workload]
    update: Callable[[], tuple[float, float]]


async def bench(settings: TrainerSettings, stop: asyncio.Event) -> int:
    """Run the bench; returns the exit status. A stop ends it after the update that runs."""
    return await asyncio.to_thread(_bench, settings, stop)


def _bench(settings: TrainerSettings, stop: asyncio.Event) -> int:
    with model_folder(settings.model_dir) as folder:
        named = str(folder) != settings.model_dir
        changes = {"model_dir": str(folder)} | ({"initial_weights": "random"} if named else {})
        world, results = _measure_all(settings.model_copy(update=changes), stop)
    try:
        if world.leads and results:
            _report(settings, world, results)
    finally:
        leave(world)
    return 0 if results else 1


def _measure_all(settings: TrainerSettings, stop: asyncio.Event) -> tuple[World, list[Result]]:
    folder = Path(settings.model_dir)
    cost = arithmetic(load_config(folder), list(meta_lm(folder).parameters()))
    results: list[Result] = []
    if settings.bench.loops != "trainer" and settings.nproc == 1:
        results += _measure_plain(settings, cost, stop)
        gc.collect()
        _empty_cache()
    if settings.bench.loops == "plain":
        return World(), results
    world, learner = build_learner(settings)
    results += _Measurement(settings, world, cost, stop).run(trainer_loop(settings, learner))
    return world, results


def trainer_loop(settings: TrainerSettings, learner: Learner, *, max_tokens: int | None = None) -> Loop:
    """The learner's updates, over steps of the bench's workload; ``max_tokens`` cuts it up otherwise."""
    world = learner.backend.world
    prepared: list[Any] = []

    def stage(step: int) -> Workload:
        load = draw(
            step,
            settings.bench,
            vocabulary=learner.backend.vocab_size,
            max_tokens=settings.max_tokens_per_micro_batch,
            num_ranks=world.size,
        )
        plan = load.plan.with_budget(max_tokens or load.plan.max_tokens)
        mine = {name: load.groups[name] for name in plan.prompt_ids_of(world.rank)}
        prepared[:] = [learner.prepare(plan, mine)]
        return replace(load, plan=plan)

    def update() -> tuple[float, float]:
        learner.begin_step(prepared[0])
        report = learner.make_update(0)
        return report.loss, report.grad_norm

    return Loop("trainer", stage, update)


def _measure_plain(settings: TrainerSettings, cost: Arithmetic, stop: asyncio.Event) -> list[Result]:
    """The plain loop with the largest micro-batches, halving the budget, that fit into memory."""
    world = World(device=_device(settings))
    objective = build_objective(settings.objective)
    for halvings in range(_HALVINGS):
        smaller = settings.max_tokens_per_micro_batch >> halvings
        loop = PlainLoop(Path(settings.model_dir), settings, objective, world.device)
        measurement = _Measurement(settings, world, cost, stop, max_tokens=smaller)
        try:
            return measurement.run(plain_loop(settings, loop, world, smaller))
        except torch.OutOfMemoryError:
            if world.leads:
                print(f"plain loop: micro-batches of {smaller} tokens do not fit into memory", flush=True)
        loop.forget()
        del loop, measurement
        gc.collect()
        _empty_cache()
    return []


def plain_loop(settings: TrainerSettings, plain: PlainLoop, world: World, max_tokens: int) -> Loop:
    """The plain loop's updates over the same workload, in micro-batches of its own size."""
    staged: list[MicroBatch] = []
    # Packing and weights are the trainer's own, so that both loops minimise the same.
    objective = build_objective(settings.objective)
    vocabulary = int(load_config(Path(settings.model_dir)).get_text_config().vocab_size)

    def stage(step: int) -> Workload:
        budget = settings.max_tokens_per_micro_batch
        load = draw(step, settings.bench, vocabulary=vocabulary, max_tokens=budget, num_ranks=1)
        plan = load.plan.with_budget(max_tokens)
        staged[:] = weighed(objective, plan, load.groups, settings)
        return replace(load, plan=plan)

    def update() -> tuple[float, float]:
        return plain.update([batch.to(world.device) for batch in staged])

    return Loop("plain", stage, update)


def weighed(objective: Any, plan: StepPlan, groups: Any, settings: TrainerSettings) -> list[MicroBatch]:
    aggregation = settings.objective.loss_aggregation
    prepared = Preparer(objective, loss_aggregation=aggregation).prepare(plan, groups).updates[0]
    predicted = prepared.batch.predicted
    total = int(predicted.sum()) if aggregation == "token" else int((predicted > 0).sum())
    return [replace(batch, weights=batch.weights / total) for batch in prepared.micro_batches]


class _Measurement:
    """Drives a loop through warm-up and measured updates."""

    def __init__(
        self,
        settings: TrainerSettings,
        world: World,
        cost: Arithmetic,
        stop: asyncio.Event,
        *,
        max_tokens: int | None = None,
    ) -> None:
        self._settings = settings
        self._world = world
        self._cost = cost
        self._stop = stop
        self._max_tokens = max_tokens or settings.max_tokens_per_micro_batch

    def run(self, loop: Loop) -> list[Result]:
        """Measure; nothing if it was stopped before anything was."""
        bench = self._settings.bench
        first = 1 + bench.warmup  # that counts
        outcomes: list[tuple[float, float]] = []
        seconds: list[float] = []
        loads: list[Workload] = []
        for step in range(1, 1 + first + bench.updates):
            if self._world.any_failed(self._stop.is_set()):
                break
            if len(seconds) == first:
                self._reset_peak()
            loads.append(loop.stage(step))
            seconds.append(self._timed(lambda: outcomes.append(loop.update())))
        if len(seconds) <= first:
            return []
        result = self._result(loop.name, seconds, loads, outcomes)
        if bench.profile:
            loop.stage(1)
            table = self._profile(loop)
            if self._world.leads:
                print(table, flush=True)
        return [result]

    def _timed(self, work: Callable[[], None]) -> float:
        self._world.barrier()
        self._synchronise()
        start = time.perf_counter()
        work()
        self._synchronise()
        return time.perf_counter() - start

    def _result(
        self, name: str, seconds: list[float], loads: list[Workload], outcomes: list[tuple[float, float]]
    ) -> Result:
        first, ranks = 1 + self._settings.bench.warmup, self._world.size
        counted = list(zip(seconds[first:], loads[first:], strict=True))
        peak = self._settings.bench.peak_tflops or peak_tflops(self._world.device)
        share = 1 / (peak * 1e12) if peak else 0.0
        by_parameters = [self._cost.by_parameters(sum(load.fed)) / s / ranks for s, load in counted]
        whole = [self._cost.whole(load.fed) / s / ranks for s, load in counted]
        return Result(
            loop=name,
            tokens_per_s=statistics.median(sum(load.fed) / s for s, load in counted),
            step_s=seconds[first:],
            first_step_s=seconds[0],
            num_tokens=[sum(load.fed) for _, load in counted],
            num_micro_batches=[load.plan.updates[0].packing.num_micro_batches for _, load in counted],
            micro_batch_tokens=self._max_tokens,
            tflops=statistics.median(by_parameters) / 1e12,
            mfu=statistics.median(by_parameters) * share,
            mfu_with_attention=statistics.median(whole) * share,
            peak_gib=self._peak(),
            losses=[loss for loss, _ in outcomes],
            grad_norms=[norm for _, norm in outcomes],
        )

    def _profile(self, loop: Loop) -> str:
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as recorded:
            loop.update()
            self._synchronise()
        key = "self_cuda_time_total" if self._world.device.type == "cuda" else "self_cpu_time_total"
        return recorded.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60)

    def _synchronise(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)

    def _reset_peak(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._world.device)

    def _peak(self) -> float:
        cuda = self._world.device.type == "cuda"
        return torch.cuda.max_memory_allocated(self._world.device) / _GIB if cuda else 0.0


_COLUMNS = (
    "tokens/s",
    "step s",
    "first step s",
    "TFLOP/s",
    "MFU",
    "MFU+attention",
    "peak GiB",
    "micro-batches",
    "first loss",
    "first norm",
)


def _device(settings: TrainerSettings) -> torch.device:
    cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _report(settings: TrainerSettings, world: World, results: list[Result]) -> None:
    device = _device(settings)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    head = f"{settings.model_dir}, {world.size} x {where}, torch {torch.__version__}"
    print(f"\n{head}, transformers {transformers.__version__}")
    print(f"{'loop':>8}" + "".join(f"{name:>14}" for name in _COLUMNS))
    for r in results:
        cells = (
            f"{r.tokens_per_s:,.0f}",
            f"{statistics.median(r.step_s):.3f}",
            f"{r.first_step_s:.1f}",
            f"{r.tflops:.1f}",
            f"{r.mfu:.3f}",
            f"{r.mfu_with_attention:.3f}",
            f"{r.peak_gib:.2f}",
            f"{max(r.num_micro_batches)} x {r.micro_batch_tokens}",
            f"{r.losses[0]:.6f}",
            f"{r.grad_norms[0]:.4f}",
        )
        print(f"{r.loop:>8}" + "".join(f"{cell:>14}" for cell in cells))
    if len(results) == 2:
        plain, ours = results
        print(f"   ratio{ours.tokens_per_s / plain.tokens_per_s:>14.2f}", end="")
        print(f"   (memory {ours.peak_gib / plain.peak_gib:.2f})" if plain.peak_gib else "", flush=True)
    if settings.bench.json_file:
        shape = {
            "model": settings.model_dir,
            "ranks": world.size,
            "device": where,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        sequences = settings.bench.model_dump(include={"min_length", "max_length", "prompt_tokens", "seed"})
        rows = [asdict(result) for result in results]
        document = shape | {"sequences": sequences, "results": rows}
        Path(settings.bench.json_file).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
