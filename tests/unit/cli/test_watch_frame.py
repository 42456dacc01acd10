"""One frame of the live view, from snapshots of every kind."""

from __future__ import annotations

import math

from rich.console import Console

from milepost.cli.watch_model import Snapshot
from milepost.cli.watch_view import draw, number, sparkline
from milepost.errors import Unavailable
from milepost.types import (
    Engine,
    EngineState,
    Evaluation,
    RolloutStatus,
    RunStats,
    StepMetrics,
    TrainerStatus,
)


def text_of(snapshot: Snapshot, *, width: int = 140) -> str:
    console = Console(width=width, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        console.print(draw(snapshot))
    return captured.get()


def full() -> Snapshot:
    s = Snapshot(run_id="demo")
    s.stats.set(
        RunStats(run_id="demo", accepted=90, waiting=5, rolling=7, ready=3, trained=70, dropped={"stale": 5})
    )
    s.engines.set(
        (
            Engine(
                engine_id="engine-0",
                url="u",
                state=EngineState.SERVING,
                weight_version=9,
                weight_label=8,
                in_flight=4,
            ),
            Engine(
                engine_id="engine-1", url="u", state=EngineState.STALE, weight_version=7, detail="joined late"
            ),
        )
    )
    evaluation = Evaluation(weight_label=8, reward_mean=0.75, num_scored=256)
    s.gateway.set(RolloutStatus(groups_in_flight=7, outcomes={"completed": 11}, last_evaluation=evaluation))
    s.trainer.set(TrainerStatus(step=8, phase="waiting", waiting_for="12 of 32 groups"))
    for i in range(1, 9):
        metrics = {"rollout/raw_reward": i / 10, "train/loss": -0.25, "milepost/step_tokens_per_s": 512.0}
        s.add_step(StepMetrics(step=i, metrics=metrics))
    return s


def test_everything_is_in_the_frame() -> None:
    frame = text_of(full())
    for expected in (
        "run demo", "step 8", "waiting", "12 of 32 groups", "0.8", "▁▂▃▄▅▆▇█", "-0.25", "512", "rolling",
        "70", "of 90 accepted", "stale 5", "engine-0", "serving", "engine-1", "stale", "joined late",
        "evaluation  0.7500 over 256 samples at step 8", "completed 11",
    ):  # fmt: skip
        assert expected in frame, expected
    assert "away" not in frame


def test_a_service_that_left_is_named_and_its_last_answer_stays() -> None:
    snapshot = full()
    snapshot.stats.fail(Unavailable("gone"), where="h:1")
    frame = text_of(snapshot)
    assert "buffer is away: gone" in frame
    assert "of 90 accepted" in frame


def test_a_frame_of_nothing() -> None:
    frame = text_of(Snapshot(run_id="r"), width=60)
    assert frame.count("is away: not asked yet") == 4
    assert not Snapshot(run_id="r").anybody_answered


def test_a_step_that_is_trained_again_replaces_what_followed_it() -> None:
    s = full()
    s.add_step(StepMetrics(step=6, metrics={"rollout/raw_reward": 0.0}))
    assert [x.step for x in s.steps] == [1, 2, 3, 4, 5, 6]
    assert s.latest("rollout/raw_reward") == 0.0
    assert s.latest("train/loss") is None


def test_generation_speed_needs_two_readings_in_order() -> None:
    s = Snapshot(run_id="r")
    assert s.generated_per_s is None
    s.generated.append((10.0, 100))
    assert s.generated_per_s is None
    s.generated.append((12.0, 500))
    assert s.generated_per_s == 200.0


def test_sparklines_and_numbers() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0, math.nan, 7]) == "▁█"
    assert len(sparkline([float(i) for i in range(100)], width=40)) == 40
    assert [number(v) for v in (None, math.inf, 3.0, 0.12345, 1e-5, 2e9)] == [
        "-",
        "-",
        "3",
        "0.1235",
        "1e-05",
        "2e+09",
    ]
