"""One model, any number of ranks: equal losses, norms, parameters and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rank_jobs import do_jobs, save_shape

pytestmark = pytest.mark.timeout(900)  # of the first test of a file: it makes all runs
TOLERANCE = 1e-5
STEPS = [1, 2, 3]
DEADLINE_S = 280  # of the jobs of one launch

Report = dict[str, Any]
Jobs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model's config in `model`."""
    made = tmp_path_factory.mktemp("ranks")
    save_shape(made / "model")
    return made


def launch(folder: Path, ranks: int, jobs: Jobs) -> dict[str, Report]:
    """Do jobs in fresh processes and return what rank 0 reports of each."""
    described = [
        {"model_dir": str(folder / "model"), "out": str(folder / f"{name}.pt"), "steps": STEPS}
        | job
        | {"settings": {"optimizer": {"lr": 1e-3}} | job.get("settings", {})}
        for name, job in jobs.items()
    ]
    done = do_jobs(described, ranks, timeout_s=DEADLINE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt") for name in jobs}


PLAIN = {"max_tokens_per_micro_batch": 100_000}
SPLIT = {"max_tokens_per_micro_batch": 40, "fsdp": {"reduce_every_micro_batch": False}}
FULL = {"updates_per_step": 2, "objective": {"loss_aggregation": "sequence", "kl_coef": 0.1}}


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Report]:
    """All runs, in three launches: one rank, then two, then one that reads what two wrote."""
    save1, save2 = str(folder / "saved-1"), str(folder / "saved-2")
    one: Jobs = {
        "one": {"settings": PLAIN, "save": str(folder / "saved-end")},
        "one-split": {"settings": SPLIT},
        "one-full": {"settings": PLAIN | FULL},
        "one-first-two": {"settings": PLAIN, "steps": STEPS[:2], "save": save1},
        "one-resumed": {"settings": PLAIN, "steps": STEPS[2:], "load": save1},
        "one-clean": {"settings": PLAIN, "steps": [1, 3]},
        "one-poisoned": {"settings": PLAIN, "poison": 2, "export": str(folder / "export-1")},
    }
    two: Jobs = {
        "two": {"settings": PLAIN},
        "two-split": {"settings": SPLIT},
        "two-full": {"settings": FULL | {"max_tokens_per_micro_batch": 64}},
        "two-first-two": {"settings": PLAIN, "steps": STEPS[:2], "save": save2},
        "two-resumed-from-one": {"settings": PLAIN, "steps": STEPS[2:], "load": save1},
        "two-poisoned": {"settings": PLAIN, "poison": 2, "export": str(folder / "export-2")},
    }
    last: Jobs = {"one-resumed-from-two": {"settings": PLAIN, "steps": STEPS[2:], "load": save2}}
    return launch(folder, 1, one) | launch(folder, 2, two) | launch(folder, 1, last)


def assert_same(ours: Report, theirs: Report) -> None:
    """Losses, norms, token means and parameters agree."""
    assert ours["updates"] == theirs["updates"]
    for mine, other in zip(ours["reports"], theirs["reports"], strict=True):
        for key in ("loss", "grad_norm"):
            assert mine[key] == pytest.approx(other[key], abs=TOLERANCE, rel=TOLERANCE)
        assert mine["tokens"] == other["tokens"]
        assert mine["means"] == pytest.approx(other["means"], abs=1e-4)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, tensor in ours["weights"].items():
        torch.testing.assert_close(tensor, theirs["weights"][name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "name, reference",
    [("one-split", "one"), ("two", "one"), ("two-split", "one"), ("two-full", "one-full")],
)
def test_ranks_and_budgets_agree(results: dict[str, Report], name: str, reference: str) -> None:
    assert_same(results[name], results[reference])
    if name != "two":
        assert results[name]["reports"][0]["micro_batches"] > 1
    losses = [report["loss"] for report in results[reference]["reports"]]
    assert max(losses) - min(losses) > 1e-3, "steps must differ to prove much"


@pytest.mark.parametrize("name", ["two-resumed-from-one", "one-resumed-from-two"])
def test_a_checkpoint_continues_on_another_number_of_ranks(results: dict[str, Report], name: str) -> None:
    whole = results["one"]
    assert_same(results[name], whole | {"reports": whole["reports"][2:]})


def test_resuming_on_as_many_ranks_is_exact(results: dict[str, Report]) -> None:
    for name, tensor in results["one-resumed"]["weights"].items():
        assert torch.equal(tensor, results["one"]["weights"][name]), name


@pytest.mark.parametrize("ranks, name", [(1, "one-poisoned"), (2, "two-poisoned")])
def test_a_gradient_that_is_not_finite_is_skipped_on_every_rank(
    folder: Path, results: dict[str, Report], ranks: int, name: str
) -> None:
    poisoned = results[name]
    assert [report["skipped"] for report in poisoned["reports"]] == [False, True, False]
    assert poisoned["updates"] == 3
    for weight, tensor in poisoned["weights"].items():
        torch.testing.assert_close(tensor, results["one-clean"]["weights"][weight], rtol=0, atol=TOLERANCE)
    exported = folder / f"export-{ranks}"
    reloaded = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    for weight, tensor in poisoned["weights"].items():
        assert torch.equal(reloaded[weight], tensor), weight
    assert (exported / "tokenizer.json").is_file()
