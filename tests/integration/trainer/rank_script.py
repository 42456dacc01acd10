"""Runs under torchrun, or alone: does the jobs of the JSON list on the command line, one after the other.

On CUDA where RANK_SCRIPT_DEVICE says so. A job's keys: model_dir, out (rank 0 writes its report there), steps
(list of step numbers), settings (of the trainer), and optionally load, save, export, poison (step in which an
importance ratio is made to blow up), rest (the backend rests before and after every step, and whatever
follows finds it at rest), scale (sequences are so many times as long), room_mib (what the last rank may
take beyond the model), older (torch has no `reset_iter_state`, as before 2.13).
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from milepost_trainer.backends.fsdp import FsdpBackend
from milepost_trainer.batch import TrainSequence
from milepost_trainer.buckets import read_bucket
from milepost_trainer.launch import exit_at_once
from milepost_trainer.learner import Learner, TrainGroup
from milepost_trainer.objectives.build import build_objective
from milepost_trainer.plan import GroupInfo, plan_step
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.world import World, join, leave

GROUPS, SAMPLES = 6, 4


def groups_of(step: int, *, scale: int = 1) -> dict[str, TrainGroup]:
    rng = np.random.default_rng(step)
    made: dict[str, TrainGroup] = {}
    for index in range(GROUPS):
        sequences = []
        for _ in range(SAMPLES):
            size = scale * int(rng.integers(3, 24))
            mask = np.zeros(size, np.uint8)
            mask[int(rng.integers(1, size)) :] = 1
            tokens = rng.integers(0, 16, size).astype(np.int32)
            logprobs = (rng.normal(-2.7, 0.2, size) * mask).astype(np.float32)
            sequences.append(TrainSequence(tokens=tokens, loss_mask=mask, logprobs=logprobs))
        made[f"s{step}/g{index}"] = TrainGroup(rng.normal(size=SAMPLES), tuple(sequences))
    return made


def poison(groups: dict[str, TrainGroup]) -> None:
    """Make one sequence's importance ratio overflow to infinity, on whichever rank it is trained."""
    group = next(iter(groups.values()))
    worst = group.sequences[0]
    np.copyto(worst.logprobs, np.where(worst.loss_mask, np.float32(-1e4), np.float32(0)))
    group.rewards[0] = -50.0


def train(learner: Learner, settings: TrainerSettings, job: dict[str, Any], world: World) -> list[Any]:
    reports = []
    for step in job["steps"]:
        if job.get("rest"):
            learner.backend.rest()
        groups = groups_of(step, scale=job.get("scale", 1))
        if step == job.get("poison"):
            poison(groups)
        infos = [GroupInfo(name, tuple(len(s.tokens) for s in g.sequences)) for name, g in groups.items()]
        plan = plan_step(
            step,
            infos,
            num_ranks=world.size,
            updates=settings.updates_per_step,
            max_tokens=settings.max_tokens_per_micro_batch,
        )
        mine = {name: groups[name] for name in plan.prompt_ids_of(world.rank)}
        assert not learner.start_step(plan, mine)
        for update in range(len(plan.updates)):
            report = learner.make_update(update)
            reports.append(
                {
                    "loss": report.loss,
                    "grad_norm": report.grad_norm,
                    "skipped": report.skipped,
                    "tokens": report.num_tokens,
                    "micro_batches": report.num_micro_batches,
                    "means": dict(report.means),
                    "oom_retries": report.oom_retries,
                    "max_tokens": report.max_tokens,
                    "allocated": report.peaks.allocated,
                }
            )
    if job.get("rest"):
        learner.backend.rest()
        assert not any(local.untyped_storage().nbytes() for local in weights_of(learner.backend))
    return reports


def weights_of(backend: Any) -> list[torch.Tensor]:
    """What this rank holds of the policy's parameters."""
    return [getattr(p.detach(), "_local_tensor", p) for p in backend._parameters]


def limit(world: World, room_mib: int) -> None:
    """On the last rank, memory ends this far above what is taken now; -1 takes the limit away."""
    if world.rank == world.size - 1 and world.device.type == "cpu":
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft = resource.RLIM_INFINITY if room_mib < 0 else taken + room_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
    elif world.rank == world.size - 1:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(world.device).total_memory
        taken = torch.cuda.memory_reserved(world.device) + room_mib * 2**20
        torch.cuda.set_per_process_memory_fraction(1.0 if room_mib < 0 else taken / total, world.device)


def run(job: dict[str, Any], world: World) -> None:
    settings = TrainerSettings(
        model_dir=job["model_dir"],
        initial_weights="random",
        device=world.device.type,
        **job["settings"],
    )
    if job.get("older"):
        del FSDPModule.reset_iter_state  # for this process and good: such jobs come last
    objective = build_objective(settings.objective)
    backend = FsdpBackend(settings, world, with_reference=objective.needs_reference)
    learner = Learner(backend, objective, loss_aggregation=settings.objective.loss_aggregation)
    if "load" in job:
        backend.load(Path(job["load"]))
    limit(world, job.get("room_mib", -1))
    reports = train(learner, settings, job, world)
    if "save" in job:
        backend.save(Path(job["save"]))
    if "export" in job:
        backend.export_hf(Path(job["export"]))
    weights: dict[str, torch.Tensor] = {}
    for bucket in backend.plan_buckets(bucket_bytes=5000, wire_dtype=None):
        flat = backend.gather_bucket(bucket)
        if flat is not None:
            weights |= {name: tensor.cpu() for name, tensor in read_bucket(bucket, flat).items()}
    if world.leads:
        torch.save({"reports": reports, "weights": weights, "updates": backend.num_updates}, job["out"])


def main() -> None:
    torch.set_num_threads(1)
    world = join(timeout_s=60, device=os.environ.get("RANK_SCRIPT_DEVICE", "cpu"))
    for job in json.loads(sys.argv[1]):
        run(job, world)
    leave(world)
    exit_at_once(0)


if __name__ == "__main__":
    main()
