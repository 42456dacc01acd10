"""A broken group is named and left out; the rest of the step trains as if it had never been there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from milepost.convert import make_group
from milepost.types import Outcome, Prompt, Sample, SamplingParams
from milepost_trainer.backends.fsdp import FsdpBackend
from milepost_trainer.batch import TrainSequence
from milepost_trainer.learner import Learner, TrainGroup
from milepost_trainer.objectives.grpo import Grpo
from milepost_trainer.payloads import read_payloads, to_train_group, write_transcripts
from milepost_trainer.plan import GroupInfo, plan_step
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.world import World


@pytest.fixture
def learner(model_dir: Path) -> Learner:
    settings = TrainerSettings.model_validate(
        {"model_dir": str(model_dir), "initial_weights": "random", "optimizer": {"lr": 1e-2}}
    )
    backend = FsdpBackend(settings, World())
    return Learner(backend, Grpo(), vocab_size=backend.vocab_size)


def group(seed: int, size: int = 6) -> TrainGroup:
    rng = np.random.default_rng(seed)
    mask = np.array([0, 0] + [1] * (size - 2), np.uint8)
    return TrainGroup(
        rewards=rng.normal(size=3),
        sequences=tuple(
            TrainSequence(
                tokens=rng.integers(0, 16, size).astype(np.int32),
                loss_mask=mask,
                logprobs=(np.full(size, -2.7) * mask).astype(np.float32),
            )
            for _ in range(3)
        ),
    )


def broken(how: str) -> TrainGroup:
    good = group(9)
    first = good.sequences[0]
    ones = np.ones(6, np.uint8)
    changed = {
        "vocabulary": replace(first, tokens=np.full(6, 16, np.int32)),
        "finite": replace(first, logprobs=np.full(6, np.nan, np.float32)),
        r"loss_mask\[0\]": replace(first, loss_mask=ones),
        "differ in length": replace(first, logprobs=first.logprobs[:5]),
        "other lengths": replace(first, tokens=first.tokens[:5]),
    }[how]
    return TrainGroup(good.rewards, (changed, *good.sequences[1:]))


def train(learner: Learner, groups: dict[str, TrainGroup | None]) -> tuple[dict[str, str], float]:
    infos = [GroupInfo(name, (6, 6, 6)) for name in groups]
    plan = plan_step(1, infos, num_ranks=1, updates=1, max_tokens=1000)
    refused = learner.start_step(plan, {name: g for name, g in groups.items() if g is not None})
    for index in range(learner.start_update(0)):
        learner.train_micro_batch(index)
    return refused, learner.finish_update().loss


@pytest.mark.parametrize(
    "how", ["vocabulary", "finite", r"loss_mask\[0\]", "differ in length", "other lengths"]
)
def test_a_broken_group_is_left_out(learner: Learner, model_dir: Path, how: str) -> None:
    refused, loss = train(learner, {"a": group(1), "bad": broken(how), "b": group(2)})
    assert list(refused) == ["bad"]
    with pytest.raises(AssertionError, match=how):
        raise AssertionError(refused["bad"])
    settings = TrainerSettings(model_dir=str(model_dir), initial_weights="random")
    fresh = Learner(FsdpBackend(settings, World()), Grpo())
    assert loss == pytest.approx(train(fresh, {"a": group(1), "b": group(2)})[1], abs=1e-7)


def test_a_missing_group_is_left_out(learner: Learner) -> None:
    refused, _ = train(learner, {"a": group(1), "gone": None})
    assert refused == {"gone": "its payload cannot be read"}


def test_a_step_of_broken_groups_alone_changes_nothing(learner: Learner) -> None:
    (bucket,) = learner.backend.plan_buckets(bucket_bytes=1 << 30, wire_dtype=None)
    before = learner.backend.gather_bucket(bucket)
    refused, loss = train(learner, {"gone": None})
    after = learner.backend.gather_bucket(bucket)
    assert refused.keys() == {"gone"}
    assert loss == 0
    assert before is not None
    assert after is not None
    assert before.equal(after)


def test_payloads_become_groups_and_transcripts(tmp_path: Path) -> None:
    prompt = Prompt(prompt_id="p", text="1+1=", label="2", sampling=SamplingParams(temperature=0.5))
    sample = Sample(
        index=0,
        tokens=np.array([1, 2, 3], np.int32),
        loss_mask=np.array([0, 0, 1], np.uint8),
        logprobs=np.array([0, 0, -1.5], np.float32),
        prompt_length=2,
        reward=1.0,
        outcome=Outcome.COMPLETED,
        text="2",
    )
    payload = make_group(prompt, attempt=1, samples=[sample]).payload
    opened = read_payloads({"p": payload, "rubbish": b"\xff\xff"})
    assert list(opened) == ["p"]
    made = to_train_group(opened["p"], default_temperature=1.0)
    assert made.rewards.tolist() == [1.0]
    assert made.sequences[0].temperature == 0.5
    assert made.sequences[0].tokens.tolist() == [1, 2, 3]
    plain = replace(opened["p"], prompt=Prompt(prompt_id="p", text="x"))
    assert to_train_group(plain, default_temperature=0.7).sequences[0].temperature == 0.7
    path = tmp_path / "deep" / "t.jsonl"
    write_transcripts(path, step=4, payloads=opened.values())
    (line,) = path.read_text().splitlines()
    assert '"response": "2"' in line
    assert '"reward": 1.0' in line
