"""The trainer as a process among a real buffer, router and engines: dies, stops, resumes, finishes."""

from __future__ import annotations

import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from milepost import BufferClient, RouterClient, TrainerClient
from milepost import types as t
from milepost.types import EngineState, StepManifest, Witness

NAME = "model.embed_tokens.weight"


async def engine_states(stack: Any) -> dict[str, t.Engine]:
    async with RouterClient(stack.router) as router:
        return {engine.engine_id: engine for engine in (await router.list_engines()).engines}


async def assert_engine_holds(stack: Any, url: str, export: Path) -> None:
    held = await stack.weights_of(url, NAME)
    values = np.array(held["parameter"] if isinstance(held, dict) else held, dtype=np.float32).reshape(-1)
    expected = load_file(export / "model.safetensors")[NAME].numpy().reshape(-1)
    np.testing.assert_array_equal(values, expected)


def witness(stack: Any) -> Witness:
    """The newest account of each step in the trainer's own log."""
    rows = {row["step"]: row for row in stack.rows("steps.jsonl")}
    steps = tuple(StepManifest(step=s, prompt_ids=tuple(r["prompt_ids"])) for s, r in sorted(rows.items()))
    return Witness(name="steps.jsonl", steps=steps)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_killed_stopped_and_finished(stack: Any, wait_until: Any, rolling: Any) -> None:
    await stack.start()
    engines = [stack.start_engine("early")]
    trainer = stack.start_trainer("--publish.transport", "gloo")
    address = await trainer.grpc()
    urls = {"early": await engines[0].url()}
    async with BufferClient(stack.buffer) as buffer:
        rolling(buffer, stack.run_id)
        await stack.feed(buffer, first=0, count=12)

        async def reached(step: int) -> bool:
            return await stack.committed(buffer) >= step

        async def published() -> bool:
            return (await buffer.get_run(stack.run_id)).weight_label == 5

        # kill -9 two steps after a checkpoint: the same groups in the same order come again, in silence.
        await stack.feed(buffer, first=12, count=10)
        await wait_until("step 5", lambda: reached(5), hint=trainer.tail)
        async with TrainerClient(address) as client:
            watched = [step.step async for step in _first(client.watch_steps(), 5)]
            assert watched == [1, 2, 3, 4, 5]
            status = await client.get_trainer_status()
            assert (status.run_id, status.world_size, status.step) == ("run", 1, 5)
            await wait_until("step 5 is published", published, hint=trainer.tail)
        trainer.process.kill()
        await trainer.exit_code()
        assert (await buffer.get_run(stack.run_id)).weight_label == 5

        trainer = stack.start_trainer("--publish.transport", "disk")
        address = await trainer.grpc()
        engines.append(stack.start_engine("late"))
        await stack.feed(buffer, first=22, count=14)
        await wait_until("step 8", lambda: reached(8), hint=trainer.tail)
        steps = defaultdict(list)
        for row in stack.rows("steps.jsonl"):
            steps[row["step"]].append(row["prompt_ids"])
        assert [len(steps[s]) for s in (3, 4, 5, 6)] == [1, 2, 2, 1]
        assert steps[4][0] == steps[4][1]
        assert steps[5][0] == steps[5][1]
        replayed = [row["step"] for row in stack.rows("metrics.jsonl") if row["milepost/step_replayed"]]
        assert replayed == [4, 5]

        # An engine that comes late is given what is published, without a step.
        urls["late"] = await engines[1].url()

        async def all_serve() -> bool:
            label = (await buffer.get_run(stack.run_id)).weight_label
            found = await engine_states(stack)
            serving = [
                e for e in found.values() if e.state is EngineState.SERVING and e.weight_label == label
            ]
            return len(serving) == 2

        await wait_until("both engines serve the newest weights", all_serve, hint=trainer.tail)

        # Paused, it trains nothing, but saves when asked.
        async with TrainerClient(address) as client:
            at = await client.pause_training()
            saved = await client.save_checkpoint(max_wait_s=60)
            assert saved.step == at
            assert Path(saved.path).name.startswith(f"step_{at:08d}.term_")
            await stack.feed(buffer, first=36, count=4)

            async def ready() -> bool:
                (stats,) = await buffer.get_stats(stack.run_id)
                return stats.ready + stats.assigned >= 4

            await wait_until("a whole step is there", ready, hint=trainer.tail)
            await wait_until("it is paused there", lambda: paused(client, at), hint=trainer.tail)
            await client.resume_training()
            await wait_until("one more step", lambda: reached(at + 1), hint=trainer.tail)

        # SIGTERM: a checkpoint of the newest step, exit 0.
        trainer.process.send_signal(signal.SIGTERM)
        assert await trainer.exit_code() == 0, trainer.tail()
        newest = max(int(p.name[5:13]) for p in stack.checkpoints.glob("step_*"))
        assert newest == await stack.committed(buffer) >= 9

        # The rest, down to a last short step; the run finishes by itself.
        trainer = stack.start_trainer("--publish.transport", "shm")
        await trainer.ready()
        await stack.feed(buffer, first=40, count=2, close=True)
        assert await trainer.exit_code() == 0, trainer.tail()
        run = await buffer.get_run(stack.run_id)
        assert (run.committed_step, run.weight_label, run.finished) == (11, 11, True)
        audit = await buffer.audit_ledger(stack.run_id, witnesses=[witness(stack)])
        assert audit.closes, audit.problems
        assert (audit.accepted, audit.trained) == (42, 42)
        export = stack.checkpoints / "final"
        for url in urls.values():
            await assert_engine_holds(stack, url, export)
        assert stack.rows("metrics.jsonl")[-1]["milepost/step_samples"] == 4
        assert (stack.metrics / "transcripts" / "step_00000004.jsonl").read_text().count("\n") == 8


async def paused(client: TrainerClient, at: int) -> bool:
    status = await client.get_trainer_status()
    return (status.phase, status.step) == ("paused", at)


async def _first(stream: Any, count: int) -> Any:
    seen = 0
    async for item in stream:
        yield item
        seen += 1
        if seen == count:
            return


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_two_ranks(stack: Any, wait_until: Any, rolling: Any) -> None:
    await stack.start()
    engine = stack.start_engine("engine")
    trainer = stack.start_trainer("--nproc", "2", "--publish.transport", "shm")
    await trainer.ready()
    url = await engine.url()
    async with BufferClient(stack.buffer) as buffer:
        rolling(buffer, stack.run_id)
        await stack.feed(buffer, first=0, count=8)

        async def trained() -> bool:
            return await stack.committed(buffer) >= 2

        await wait_until("two steps", trained, hint=trainer.tail)
        trainer.process.send_signal(signal.SIGTERM)
        assert await trainer.exit_code() == 0, trainer.tail()
        assert [p.name[:13] for p in sorted(stack.checkpoints.glob("step_*"))][-1] == "step_00000002"

        again = stack.start_trainer("--nproc", "1", "--publish.transport", "shm")
        await again.ready()
        await stack.feed(buffer, first=8, count=4, close=True)
        assert await again.exit_code() == 0, again.tail()
        assert (await buffer.audit_ledger(stack.run_id, witnesses=[witness(stack)])).closes
    await assert_engine_holds(stack, url, stack.checkpoints / "final")
    assert len(list((stack.metrics / "transcripts").glob("step_00000002.rank_*.jsonl"))) == 2


async def test_wrong_settings_are_refused_before_anything_starts(stack: Any) -> None:
    trainer = stack.start_trainer("--optimizer.lrr", "1")
    assert await trainer.exit_code() == 2
    assert "optimizer.lr" in trainer.tail()
