"""`milepost trainer bench`: what it draws, what it counts, and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from milepost.errors import InvalidArgument
from milepost_trainer.bench.plain import pad
from milepost_trainer.bench.shapes import arithmetic, load_config, model_folder
from milepost_trainer.bench.workload import draw
from milepost_trainer.objectives.grpo import Grpo
from milepost_trainer.policy import load_policy, meta_lm
from milepost_trainer.prepare import Preparer
from milepost_trainer.settings import BenchSettings

MIXED = BenchSettings(min_length=20, max_length=200, micro_batches=3, prompt_tokens=5)


def test_a_step_is_drawn_alike_again_and_fills_its_micro_batches() -> None:
    first, again = (draw(2, MIXED, vocabulary=50, max_tokens=1000, num_ranks=2) for _ in range(2))
    other = draw(3, MIXED, vocabulary=50, max_tokens=1000, num_ranks=2)
    assert first.plan == again.plan != other.plan
    assert first.fed == draw(2, MIXED, vocabulary=999, max_tokens=1000, num_ranks=2).fed
    assert sum(first.fed) == pytest.approx(3 * 2 * 1000 * 0.97, rel=0.02)
    assert first.plan.updates[0].packing.num_micro_batches in (3, 4)
    for name, group in first.groups.items():
        for ours, theirs in zip(group.sequences, again.groups[name].sequences, strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)


def test_equal_lengths_fill_the_budget_exactly() -> None:
    even = BenchSettings(min_length=100, max_length=100, micro_batches=2, prompt_tokens=5)
    load = draw(0, even, vocabulary=50, max_tokens=500, num_ranks=1)
    assert load.fed == [99] * 10
    assert [len(batch) for batch in load.plan.updates[0].packing.ranks[0]] == [5, 5]


def test_operations_are_counted_from_the_model_itself() -> None:
    with model_folder("tiny") as folder:
        cost = arithmetic(load_config(folder), list(meta_lm(folder).parameters()))
        policy = load_policy(folder, dtype=torch.float32, initial_weights="random")
    assert cost.parameters == sum(p.numel() for p in policy.parameters())
    assert cost.by_parameters(10) == 60 * cost.parameters
    assert cost.whole([3, 5]) - cost.by_parameters(8) == 6 * 2 * 4 * 16 * (9 + 25)


@pytest.mark.parametrize(
    "name, billions", [("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.721), ("qwen3-4b", 4.022)]
)
def test_shapes_have_the_parameters_that_their_names_say(name: str, billions: float) -> None:
    with model_folder(name) as folder:
        cost = arithmetic(load_config(folder), list(meta_lm(folder).parameters()))
    assert cost.parameters / 1e9 == pytest.approx(billions, abs=5e-4)


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with (
        pytest.raises(InvalidArgument, match=r"qwen3-9b: name a folder.*qwen3-0\.6b"),
        model_folder("qwen3-9b"),
    ):
        pass


def test_lengths_that_leave_no_answer_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt_tokens is 128, min_length 100"):
        BenchSettings(min_length=100)


def test_padding_keeps_every_token_in_its_row() -> None:
    load = draw(0, MIXED, vocabulary=50, max_tokens=1000, num_ranks=1)
    batch = Preparer(Grpo()).prepare(load.plan, load.groups).updates[0].micro_batches[0]
    cells, padded = pad(batch)
    assert padded.shape == (len(batch.layout.lengths), max(batch.layout.lengths))
    ends = np.cumsum(batch.layout.lengths)
    for row, (end, size) in enumerate(zip(ends, batch.layout.lengths, strict=True)):
        assert padded[row, :size].tolist() == batch.input_ids[0, end - size : end].tolist()
        assert padded[row, size:].eq(0).all()
    assert padded.view(-1)[cells].tolist() == batch.input_ids[0].tolist()


def test_the_command_measures_both_loops_and_writes_them_down(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "milepost_trainer", "bench", "--model_dir", "tiny", "--device", "cpu"]
    flags = {
        "max_tokens_per_micro_batch": 256,
        "bench.min_length": 20,
        "bench.max_length": 100,
        "bench.micro_batches": 2,
        "bench.updates": 2,
        "bench.warmup": 0,
        "bench.prompt_tokens": 8,
        "bench.json_file": out,
    }
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(out.read_text())
    plain, ours = written["results"]
    assert (plain["loop"], ours["loop"]) == ("plain", "trainer")
    assert written["sequences"]["max_length"] == 100
    assert plain["num_tokens"] == ours["num_tokens"]
    assert len(plain["step_s"]) == len(ours["step_s"]) == 2
    np.testing.assert_allclose(ours["losses"], plain["losses"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours["grad_norms"], plain["grad_norms"], rtol=1e-4)
    assert "ratio" in done.stdout
