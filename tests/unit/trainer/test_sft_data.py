"""Warm-start data: masks, what is skipped and why, batches; and a short training that learns."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from milepost.errors import InvalidArgument
from milepost_trainer.settings import SftSettings, TrainerSettings
from milepost_trainer.sft import read_data, sft_settings, shuffled_batches, train


@pytest.fixture
def tokenizer() -> Any:
    vocabulary = {c: i for i, c in enumerate("0123456789+=\n")} | {"<pad>": 13}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="\n", pad_token="<pad>")


def test_only_the_completion_carries_loss_and_ends_once(tmp_path: Path, tokenizer: Any) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": "1+2=", "completion": "3"}, {"prompt": "1+2=", "completion": "3\n"}]
    data.write_text("\n".join(map(json.dumps, rows)))
    for sequence in read_data(data, tokenizer=tokenizer, settings=SftSettings()):
        assert sequence.tokens.tolist() == [1, 10, 2, 11, 3, 12]
        assert sequence.loss_mask.tolist() == [0, 0, 0, 0, 1, 1]


def test_a_bad_line_is_named_and_skipped(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data.jsonl"
    lines = ["{", "[1]", '{"prompt": "1"}', '{"completion": "1"}', "", '{"prompt":"1","completion":"2"}']
    data.write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        assert len(read_data(data, tokenizer=tokenizer, settings=SftSettings())) == 1
    skipped = [record.getMessage() for record in caplog.records]
    assert [f"line {n} skipped" in m for n, m in zip((1, 2, 3, 4), skipped, strict=True)] == [True] * 4
    assert "completion is None" in skipped[2]


def test_unusable_files_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InvalidArgument, match="no such file"):
        read_data(tmp_path / "none", tokenizer=tokenizer, settings=SftSettings())
    (tmp_path / "empty").write_text("{}\n")
    with pytest.raises(InvalidArgument, match="no line of it can be used"):
        read_data(tmp_path / "empty", tokenizer=tokenizer, settings=SftSettings())


def test_batches_pass_over_everything_once_an_epoch() -> None:
    batches = list(islice(shuffled_batches(10, size=4, seed=3), 5))
    assert [b.size for b in batches] == [4] * 5
    assert set(Counter(np.concatenate(batches).tolist()).values()) == {2}
    again = list(islice(shuffled_batches(10, size=4, seed=3), 5))
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))


def test_settings_of_the_warm_start() -> None:
    base = TrainerSettings.model_validate({"model_dir": "m", "optimizer": {"lr": 1e-3, "eps": 1e-6}})
    with pytest.raises(InvalidArgument, match=r"trainer\.sft\.data is empty"):
        sft_settings(base)
    given = base.model_copy(
        update={"sft": SftSettings(data="d", output_dir="o", num_steps=50, lr=3e-3, warmup_updates=5)}
    )
    made = sft_settings(given)
    assert (made.optimizer.lr, made.optimizer.eps) == (3e-3, 1e-6)
    assert (made.schedule.kind, made.schedule.warmup_updates, made.schedule.total_updates) == (
        "linear",
        5,
        50,
    )
    assert made.objective.algorithm == "sft"


async def test_it_learns_and_exports(tmp_path: Path, model_dir: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(model_dir)
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{i}+0=", "completion": str(i)}) + "\n" for i in range(10))
    )
    settings = TrainerSettings.model_validate(
        {
            "model_dir": str(model_dir),
            "initial_weights": "random",
            "metrics": {"dir": str(tmp_path / "metrics")},
            "sft": {
                "data": str(data),
                "output_dir": str(tmp_path / "out"),
                "num_steps": 60,
                "batch_size": 10,
                "lr": 1e-2,
            },
        }
    )
    assert await train(settings, asyncio.Event()) == 0
    log = [json.loads(r) for r in (tmp_path / "metrics" / "sft_metrics.jsonl").read_text().splitlines()]
    assert len(log) == 60
    assert log[-1]["train/loss"] < 0.1 < log[0]["train/loss"]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
