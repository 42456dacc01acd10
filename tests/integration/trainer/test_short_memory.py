"""A trainer of two ranks, one of them short of memory, with state on the host and a profiler's window."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from milepost import BufferClient
from milepost.types import StepManifest, Witness

NAME = "model.embed_tokens.weight"
LONGEST = 10  # tokens of the longest sequence that the test's gateway rolls, as a pass feeds it


def short_of_memory(*, tokens: int) -> tuple[str, ...]:
    flags = {"out_of_memory": "backward", "out_of_memory_rank": 1, "out_of_memory_tokens": tokens}
    return (
        "--debug.enabled",
        *(word for key, value in flags.items() for word in (f"--debug.{key}", str(value))),
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_run_finishes_on_ranks_that_are_short_of_memory(
    stack: Any, rolling: Any, tmp_path: Path
) -> None:
    await stack.start()
    engine = stack.start_engine("engine")
    trainer = stack.start_trainer(
        *("--publish.transport", "disk", "--nproc", "2", "--offload", "all"),
        *("--profile.first_step", "2", "--profile.dir", str(tmp_path / "profile")),
        *short_of_memory(tokens=LONGEST),
    )
    async with BufferClient(stack.buffer) as buffer:
        await trainer.ready()
        rolling(buffer, stack.run_id)
        await stack.feed(buffer, first=0, count=16, close=True)
        assert await trainer.exit_code() == 0, trainer.tail()
        audit = await buffer.audit_ledger(stack.run_id, witnesses=[witness(stack)])
    assert (audit.trained, audit.problems) == (16, ())
    steps, metrics = stack.rows("steps.jsonl"), stack.rows("metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert_recorded(steps, metrics)
    assert_timed(metrics)
    assert_traced(tmp_path / "profile")
    held = await stack.weights_of(await engine.url(), NAME)
    values = np.array(held["parameter"] if isinstance(held, dict) else held, dtype=np.float32).reshape(-1)
    exported = load_file(stack.checkpoints / "final" / "model.safetensors")[NAME].numpy().reshape(-1)
    np.testing.assert_array_equal(values, exported)


def assert_recorded(steps: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> None:
    """What was begun again stands in both files, and the size that was found is kept."""
    assert sum(row["train/oom_retries"] for row in metrics) > 0
    for logged, row in zip(steps, metrics, strict=True):
        noted = (
            logged.get("oom_retries", 0),
            logged.get("micro_batch_tokens", row["milepost/step_micro_batch_tokens"]),
        )
        assert noted == (row["train/oom_retries"], row["milepost/step_micro_batch_tokens"])
    sizes = [row["milepost/step_micro_batch_tokens"] for row in metrics]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= LONGEST + 1 < 24


def assert_timed(metrics: list[dict[str, Any]]) -> None:
    """The parts of a step are told, and none is longer than the step."""
    parts = ("train_wait", "forward_backward", "optimizer", "update_weights", "save_model")
    for row in metrics:
        times = [row[f"perf/{part}_time"] for part in parts]
        assert all(time >= 0 for time in times)
        assert sum(times) <= row["perf/step_time"]
        assert min(row[f"perf/{part}_time"] for part in ("forward_backward", "optimizer", "offload")) > 0
        assert min(row[f"perf/data_{part}_time"] for part in ("fetch", "preprocess")) > 0
        assert row["perf/train_time"] == row["perf/forward_backward_time"] + row["perf/optimizer_time"]
        assert row["perf/cpu_memory_used_gb"] > 0.05
        assert row["perf/max_memory_allocated_gb"] is None


def assert_traced(folder: Path) -> None:
    traces = sorted(path.name for path in folder.iterdir())
    assert traces == [f"steps_00000002-00000002.rank_{rank}.trace.json.gz" for rank in (0, 1)]
    for name in traces:
        with gzip.open(folder / name, "rt") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"milepost::micro_batch 0", "milepost::optimizer", "FSDP::all_gather"} <= {
            name.partition(" (")[0] for name in names if name
        }


def witness(stack: Any) -> Witness:
    steps = [
        StepManifest(step=r["step"], prompt_ids=tuple(r["prompt_ids"])) for r in stack.rows("steps.jsonl")
    ]
    return Witness(name="steps.jsonl", steps=tuple(steps))


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_sequence_that_never_fits_ends_the_trainer_with_its_name(stack: Any, rolling: Any) -> None:
    await stack.start()
    stack.start_engine("engine")
    trainer = stack.start_trainer("--publish.transport", "shm", "--nproc", "2", *short_of_memory(tokens=2))
    async with BufferClient(stack.buffer) as buffer:
        await trainer.ready()
        rolling(buffer, stack.run_id)
        await stack.feed(buffer, first=0, count=4)
        assert await trainer.exit_code() == 1, trainer.tail()
        assert (await buffer.get_run(stack.run_id)).committed_step == 0
    said = trainer.log.read_text()
    assert "rank 1 has no memory for one sequence alone: " in said
    assert "of prompt 'p/" in said
    assert "lower run.sampling.max_new_tokens" in said
