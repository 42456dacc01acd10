"""State that waits on the host: the same numbers to the bit, on one rank and two; checkpoints in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rank_jobs import do_jobs, save_shape

pytestmark = pytest.mark.timeout(900)  # of the first test of a file: it makes all runs
STEPS = [1, 2, 3]
DEADLINE_S = 280  # of the jobs of one launch
KL = {"objective": {"kl_coef": 0.1}}

Report = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model's config in `model`."""
    made = tmp_path_factory.mktemp("offload")
    save_shape(made / "model")
    return made


def launch(folder: Path, ranks: int) -> dict[str, Report]:
    saved = str(folder / f"saved-{ranks}")
    jobs: dict[str, dict[str, Any]] = {
        "none": {"settings": KL},
        "optimizer": {"settings": KL | {"offload": "optimizer"}},
        "all": {"settings": KL | {"offload": "all"}, "rest": True, "export": str(folder / f"export-{ranks}")},
        "saved": {"settings": KL | {"offload": "all"}, "rest": True, "steps": STEPS[:2], "save": saved},
        "resumed": {"settings": KL | {"offload": "optimizer"}, "steps": STEPS[2:], "load": saved},
        "resumed-none": {"settings": KL, "steps": STEPS[2:], "load": saved},
    }
    base = {"model_dir": str(folder / "model"), "steps": STEPS}
    described = [base | job | {"out": str(folder / f"{ranks}-{name}.pt")} for name, job in jobs.items()]
    for job in described:
        job["settings"] = {"optimizer": {"lr": 1e-3}} | job["settings"]
    done = do_jobs(described, ranks, timeout_s=DEADLINE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{ranks}-{name}.pt") for name in jobs}


@pytest.fixture(scope="module", params=[1, 2])
def results(folder: Path, request: pytest.FixtureRequest) -> dict[str, Report]:
    """Every job on one rank, then on two."""
    return launch(folder, request.param)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer", "all", "resumed", "resumed-none"])
def test_where_state_waits_changes_nothing(results: dict[str, Report], name: str) -> None:
    whole = results["none"]
    ours = results[name]
    assert ours["updates"] == whole["updates"]
    for mine, other in zip(reversed(ours["reports"]), reversed(whole["reports"]), strict=False):
        assert (mine["loss"], mine["grad_norm"]) == (other["loss"], other["grad_norm"])
    assert ours["weights"].keys() == whole["weights"].keys()
    for weight, tensor in ours["weights"].items():
        assert torch.equal(tensor, whole["weights"][weight]), weight
