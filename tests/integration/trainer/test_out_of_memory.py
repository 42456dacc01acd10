"""One rank of several runs out of memory: the step completes on all of them, as if nothing had happened.

Mostly by order, so that the place is known; once for real, by a limit of the kernel's. The fault stays: it
strikes every pass of more than so many tokens, as a real limit would, so that a plan that is not made smaller
fails again. A rank that is left waiting would end these runs by their deadline.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from rank_jobs import do_jobs, save_shape

TOLERANCE = 1e-5
DEADLINE_S = 280
LIMIT = 50
STEPS = [1, 2]

Report = dict[str, Any]
PLAIN: dict[str, Any] = {"max_tokens_per_micro_batch": 100_000}
FULL: dict[str, Any] = PLAIN | {
    "updates_per_step": 2,
    "objective": {"loss_aggregation": "sequence", "kl_coef": 0.1, "truncated_importance_sampling": 2.0},
}
LATE = PLAIN | {"fsdp": {"reduce_every_micro_batch": False, "activation_checkpointing": "full"}}
WHOLE = PLAIN | {"fsdp": {"reshard_after_forward": False}}
THIRD = {"max_tokens_per_micro_batch": 60, "fsdp": {"reshard_after_forward": False}}
"""Three micro-batches on each rank, of which rank 0's last alone is above the limit, in the first step."""
MIXED = PLAIN | {"compute_dtype": "bfloat16"}


def fault(place: str, *, rank: int, tokens: int = LIMIT) -> dict[str, Any]:
    return {
        "debug": {
            "enabled": True,
            "out_of_memory": place,
            "out_of_memory_rank": rank,
            "out_of_memory_tokens": tokens,
        }
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models' configs: `model`, and `large`, whose activations are tens of megabytes."""
    made = tmp_path_factory.mktemp("memory")
    save_shape(made / "model", num_hidden_layers=3, max_position_embeddings=512)
    wide = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
    save_shape(made / "large", num_hidden_layers=4, max_position_embeddings=512, **wide)
    return made


Jobs = dict[str, dict[str, Any]]


def start(
    folder: Path, ranks: int, jobs: Jobs, extra: Jobs | None = None
) -> subprocess.CompletedProcess[str]:
    """Do jobs of these settings; `extra` holds further keys of some."""
    described = [
        {
            "model_dir": str(folder / "model"),
            "out": str(folder / f"{ranks}-{name}.pt"),
            "steps": STEPS,
            "settings": {"optimizer": {"lr": 1e-3}} | settings,
        }
        | (extra or {}).get(name, {})
        for name, settings in jobs.items()
    ]
    # One arena: what one thread frees, all may take.
    return do_jobs(described, ranks, timeout_s=DEADLINE_S, MALLOC_ARENA_MAX="1")


def results(folder: Path, ranks: int, jobs: Jobs, extra: Jobs | None = None) -> dict[str, Report]:
    done = start(folder, ranks, jobs, extra)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{ranks}-{name}.pt") for name in jobs}


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Report]:
    """All runs on two ranks: clean ones, and each with a fault."""
    jobs = {"plain": PLAIN, "full": FULL, "late": LATE, "whole": WHOLE, "mixed": MIXED}
    for place in ("forward", "head", "backward", "clip", "optimizer"):
        jobs |= {f"plain-{place}": PLAIN | fault(place, rank=1)}
    for name in ("full", "late", "whole", "mixed"):
        jobs |= {f"{name}-{place}": jobs[name] | fault(place, rank=0) for place in ("forward", "backward")}
    jobs |= {"third": THIRD, "third-forward": THIRD | fault("forward", rank=0)}
    return results(folder, 2, jobs)


@pytest.fixture(scope="module")
def others(folder: Path) -> dict[str, Report]:
    """One rank, and three."""
    places = ("forward", "head", "backward", "optimizer")
    found = {
        f"1-{n}": r
        for n, r in results(folder, 1, {"plain": PLAIN, "head": PLAIN | fault("head", rank=0)}).items()
    }
    jobs = {"plain": PLAIN, "all": PLAIN | fault("backward", rank=-1)}
    jobs |= {place: PLAIN | fault(place, rank=2) for place in places}
    return found | {f"3-{n}": r for n, r in results(folder, 3, jobs).items()}


def assert_same(ours: Report, theirs: Report, *, tolerance: float = TOLERANCE) -> None:
    assert ours["updates"] == theirs["updates"]
    for mine, other in zip(ours["reports"], theirs["reports"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=tolerance, rel=tolerance)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], abs=tolerance, rel=tolerance)
        assert (mine["tokens"], mine["skipped"]) == (other["tokens"], False)
    for name, tensor in ours["weights"].items():
        torch.testing.assert_close(tensor, theirs["weights"][name], rtol=0, atol=tolerance)


def assert_was_halved(report: Report, clean: Report) -> None:
    first, *later = report["reports"]
    assert first["oom_retries"] > 0
    assert LIMIT / 2 < first["max_tokens"] <= 2 * LIMIT  # tokens of the plan; a pass feeds fewer
    assert first["micro_batches"] > clean["reports"][0]["micro_batches"]
    for each in later:  # the size is kept; what it still has to learn is how long the next step's tails are
        assert each["max_tokens"] <= first["max_tokens"]
        assert each["oom_retries"] <= 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", ["forward", "head", "backward"])
def test_a_pass_that_does_not_fit_on_one_of_two_ranks(two: dict[str, Report], place: str) -> None:
    assert_same(two[f"plain-{place}"], two["plain"])
    assert_was_halved(two[f"plain-{place}"], two["plain"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", ["clip", "optimizer"])
def test_an_optimizer_that_runs_out_on_one_of_two_ranks(two: dict[str, Report], place: str) -> None:
    report = two[f"plain-{place}"]
    assert_same(report, two["plain"])
    assert [each["oom_retries"] for each in report["reports"]] == [1, 0]
    assert report["reports"][0]["max_tokens"] == PLAIN["max_tokens_per_micro_batch"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["full", "late", "whole"])
def test_with_scores_of_other_policies_and_other_ways_to_shard(
    two: dict[str, Report], kind: str, place: str
) -> None:
    assert_same(two[f"{kind}-{place}"], two[kind])
    assert_was_halved(two[f"{kind}-{place}"], two[kind])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_in_a_later_pass_with_modules_that_stayed_whole(two: dict[str, Report]) -> None:
    """What is owed then is counted from the update's first pass: its all-gathers were made, and stay so."""
    assert_same(two["third-forward"], two["third"])
    assert [each["micro_batches"] for each in two["third"]["reports"]] == [3, 3]
    assert [each["oom_retries"] for each in two["third-forward"]["reports"]] == [1, 0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_where_torch_cannot_reset_an_iteration(folder: Path) -> None:
    jobs = {"clean": LATE, "backward": LATE | fault("backward", rank=1), "head": LATE | fault("head", rank=0)}
    found = results(folder, 2, jobs, {"backward": {"older": True}})
    for name in ("backward", "head"):
        assert_same(found[name], found["clean"])
        assert_was_halved(found[name], found["clean"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_in_mixed_precision(two: dict[str, Report], place: str) -> None:
    assert_same(two[f"mixed-{place}"], two["mixed"], tolerance=2e-2)
    assert_was_halved(two[f"mixed-{place}"], two["mixed"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", ["forward", "head", "backward", "all"])
def test_a_pass_that_does_not_fit_on_one_of_three_ranks_or_on_all(
    others: dict[str, Report], place: str
) -> None:
    assert_same(others[f"3-{place}"], others["3-plain"])
    assert_was_halved(others[f"3-{place}"], others["3-plain"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_alone_and_in_the_optimizer_of_three(others: dict[str, Report]) -> None:
    assert_same(others["1-head"], others["1-plain"])
    assert_was_halved(others["1-head"], others["1-plain"])
    assert_same(others["3-optimizer"], others["3-plain"])
    assert others["3-optimizer"]["reports"][0]["oom_retries"] == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs Linux's account of a process's memory"
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_whose_memory_really_ends(folder: Path, ranks: int) -> None:
    """The kernel gives the last rank less than its micro-batch takes; torch meets that wherever it does."""
    one = {"model_dir": str(folder / "large"), "scale": 16}
    settings = PLAIN | {"optimizer": {"lr": 1e-3, "eps": 1e-2}}  # what is nearly zero moves by nearly nothing
    # Each in processes of its own: what an earlier job has let go of would be room besides.
    clean = results(folder, ranks, {"large": settings}, {"large": one})["large"]
    full = results(folder, ranks, {"full": settings}, {"full": one | {"room_mib": 100}})["full"]
    assert_same(full, clean)
    assert full["reports"][0]["oom_retries"] > 0
    assert full["reports"][0]["micro_batches"] > clean["reports"][0]["micro_batches"] == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sequence_that_does_not_fit_alone_ends_the_tries_and_is_named(folder: Path) -> None:
    done = start(folder, 2, {"long": PLAIN | fault("backward", rank=1, tokens=12)})
    assert done.returncode != 0
    named = "rank 1 has no memory for one sequence alone: "
    assert named in done.stderr
    message = done.stderr.partition(named)[2].splitlines()[0]
    assert "of prompt 's1/g" in message
    assert "trainer.offload" in message
    assert not (folder / "2-long.pt").exists()
