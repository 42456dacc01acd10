"""Metrics, step log, status and the control surface."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from milepost import TrainerClient
from milepost import types as t
from milepost.errors import InvalidArgument
from milepost.v1 import trainer_pb2_grpc
from milepost_common.server import GrpcServer
from milepost_trainer.learner import UpdateReport
from milepost_trainer.memory import MemoryPeaks
from milepost_trainer.meters import STEP
from milepost_trainer.metrics import shortage_notes, step_metrics
from milepost_trainer.recorder import Recorder
from milepost_trainer.status import TrainerState
from milepost_trainer.timing import StepTimes
from milepost_trainer.trainer_servicer import SERVICE, TrainerServicer

GROUPS = (
    t.StepGroup(prompt_id="a", num_tokens=(5, 7), num_loss_tokens=8, rewards=(1.0, 0.0), staleness=0),
    t.StepGroup(prompt_id="b", num_tokens=(4, 4), num_loss_tokens=6, rewards=(math.nan, 0.5), staleness=2),
)
UPDATES = (
    UpdateReport(
        0.5, 2.0, 1e-3, False, 10, 1, {"entropy_loss": 1.0}, 2, 64, MemoryPeaks(2**30, 2**31, 2**32)
    ),
    UpdateReport(0.1, math.inf, 2e-3, True, 30, 2, {"entropy_loss": 2.0}, 1, 32, MemoryPeaks(2**29)),
)


def metrics() -> dict[str, float | None]:
    return step_metrics(
        groups=GROUPS,
        updates=UPDATES,
        times=StepTimes(
            wait_s=1, forward_backward_s=1.5, optimizer_s=0.5, publish_s=0.5, step_s=4, fetch_s=0.25
        ),
        weight_version=8,
        term=3,
        dropped=1,
        replayed=True,
        wall_time=1e9,
    )


def test_step_metrics() -> None:
    got = metrics()
    assert got["train/loss"] == pytest.approx(0.3)
    assert got["rollout/raw_reward"] == pytest.approx(0.5)
    assert (got["rollout/response_lengths"], got["rollout/total_lengths"]) == (3.5, 5.0)
    assert got["train/entropy_loss"] == pytest.approx(1.75)
    assert got["train/grad_norm"] is None
    assert got["train/lr-pg_0"] == 2e-3
    assert (got["perf/train_wait_time"], got["perf/wait_time_ratio"], got["perf/step_time"]) == (1, 0.25, 4)
    assert (got["perf/actor_train_tok_per_s"], got["milepost/step_tokens_per_s"]) == (10.0, 5.0)

    def own(*names: str) -> tuple[float | None, ...]:
        return tuple(got[f"milepost/step_{name}"] for name in names)

    assert own("tokens", "sample_tokens") == (40, 20)
    assert own("staleness_mean", "staleness_max") == (1.0, 2)
    assert own("skipped_updates", "micro_batches", "dropped_groups") == (1, 3, 1)
    assert own("samples", "groups", "replayed") == (4, 2, 1.0)
    assert (got["train/oom_retries"], *own("micro_batch_tokens")) == (3, 32)
    perf = ("train_time", "forward_backward_time", "optimizer_time", "data_fetch_time")
    assert [got[f"perf/{name}"] for name in perf] == [2.0, 1.5, 0.5, 0.25]
    memory = ("max_memory_allocated_gb", "max_memory_reserved_gb", "cpu_memory_used_gb")
    assert [got[f"perf/{name}"] for name in memory] == [1.0, 2.0, 4.0]


def test_every_metric_of_a_step_has_its_meaning_written_down() -> None:
    assert set(metrics()) - {"time"} <= {spec.name for spec in STEP}


def test_records_are_appended_and_stay_json(tmp_path: Path) -> None:
    for _ in range(2):
        with Recorder(tmp_path, tensorboard=False) as recorder:
            recorder.write_commit(
                t.StepManifest(step=4, prompt_ids=("a", "b")), term=3, notes=shortage_notes(UPDATES)
            )
            recorder.write_metrics(4, metrics() | {"odd": math.nan})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 4]
    assert rows[0]["odd"] is None
    notes = {"oom_retries": 3, "micro_batch_tokens": 32}
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert steps[0] == {"step": 4, "prompt_ids": ["a", "b"], "dropped": {}, "term": 3} | notes


def test_tensorboard_files(tmp_path: Path) -> None:
    with Recorder(tmp_path, tensorboard=True) as recorder:
        recorder.write_metrics(1, metrics())
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.stat().st_size > 500


@pytest.fixture
async def state() -> TrainerState:
    return TrainerState(run_id="run", world_size=2)


@pytest.fixture
async def client(state: TrainerState) -> AsyncIterator[TrainerClient]:
    async with GrpcServer(listen="127.0.0.1:0", grace_s=0.1) as server:
        server.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, TrainerServicer(state), SERVICE)
        await server.start()
        async with TrainerClient(server.address) as made:
            yield made


async def test_status_and_pause(state: TrainerState, client: TrainerClient) -> None:
    state.term, state.step = 5, 12
    state.enter("waiting", "the groups of step 13")
    got = await client.get_trainer_status()
    assert (got.run_id, got.term, got.step, got.world_size) == ("run", 5, 12, 2)
    assert (got.phase, got.waiting_for) == ("waiting", "the groups of step 13")
    assert await client.pause_training() == 12
    assert state.paused
    assert state.woken.is_set()
    await client.resume_training()
    assert not state.paused


async def test_save_waits_for_the_loop(state: TrainerState, client: TrainerClient) -> None:
    assert await client.save_checkpoint() == t.SavedCheckpoint()
    assert state.save_wanted
    state.woken.clear()
    asked = asyncio.create_task(client.save_checkpoint(max_wait_s=60))
    await state.woken.wait()
    state.checkpoint = t.SavedCheckpoint(step=3, path="/there")
    state.save_wanted = False
    state.announce()
    assert await asked == t.SavedCheckpoint(step=3, path="/there")


async def test_watchers_see_every_step_once_and_the_end(state: TrainerState, client: TrainerClient) -> None:
    state.add_step(1, {"loss": 0.5})
    state.add_step(2, {"loss": 0.4})
    seen: list[int] = []
    live = asyncio.Event()

    async def watch() -> None:
        async for step in client.watch_steps(after_step=1):
            seen.append(step.step)
            live.set()

    task = asyncio.create_task(watch())
    await live.wait()
    state.add_step(3, {"loss": 0.3})
    state.enter("finished")
    await asyncio.wait_for(task, 30)
    assert seen == [2, 3]


async def test_watchers_of_a_quiet_trainer_are_let_go(state: TrainerState, client: TrainerClient) -> None:
    state.add_step(1, {"loss": 0.5})
    async with asyncio.timeout(30):
        assert [step.step async for step in client.watch_steps(max_wait_s=0.1)] == [1]
    with pytest.raises(InvalidArgument, match=r"max_wait = 301 s: give 0 to 300 s"):
        await anext(client.watch_steps(max_wait_s=301))
