"""Out of memory, as far as one rank decides it: what counts as one, how a plan shrinks, what a try leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from milepost_trainer.backends.fsdp import FsdpBackend
from milepost_trainer.backends.random_state import RandomState
from milepost_trainer.backends.recovery import BrokenCollective, DoesNotFit, Dues, Recovery, is_out_of_memory
from milepost_trainer.batch import SequenceBatch, TrainSequence, dummy_batch
from milepost_trainer.learner import Learner, TrainGroup
from milepost_trainer.memory import MemoryPeaks, PeakMeter, largest, over_ranks
from milepost_trainer.objectives.grpo import Grpo
from milepost_trainer.plan import GroupInfo, plan_step
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.shortage import SequenceDoesNotFit, Shortage, smaller_budget
from milepost_trainer.world import World

CPU = torch.device("cpu")


def refusal(size_bytes: int) -> BaseException:
    """What torch's own allocator raises for more than there is."""
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(size_bytes, dtype=torch.uint8)
    return caught.value


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(refusal(1 << 52))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_largest_shortage_of_all_ranks_is_halved() -> None:
    shortages = [Shortage(0, 100, 3, "a", 0, 60), Shortage(2, 140, 2, "b", 1, 139)]
    assert smaller_budget(shortages) == 70
    with pytest.raises(SequenceDoesNotFit, match=r"rank 1 .* 999 tokens, sample 4 of prompt 'p/7'"):
        smaller_budget([*shortages, Shortage(1, 999, 1, "p/7", 4, 999)])
    with pytest.raises(SequenceDoesNotFit):
        smaller_budget([Shortage(0, 0, 0)])


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), limit=st.integers(1, 200))
def test_halving_ends_with_what_fits_or_with_a_sequence_that_does_not(lengths: list[int], limit: int) -> None:
    infos = [GroupInfo(f"g{i}", (n, n // 2 + 1)) for i, n in enumerate(lengths)]
    plan = plan_step(1, infos, num_ranks=2, updates=1, max_tokens=10_000)
    for _ in range(40):
        short = []
        for rank, bins in enumerate(plan.updates[0].packing.ranks):
            sizes = [n for _, _, n in plan.sequences_of(0, rank)]
            short += [Shortage(rank, sum(sizes[i] for i in items), len(items)) for items in bins if items]
        over = [each for each in short if each.num_tokens > limit]
        if not over:
            return
        try:
            budget = smaller_budget(over)
        except SequenceDoesNotFit:
            assert max(each.num_tokens for each in over if each.num_sequences == 1) > limit
            return
        assert 0 < budget < plan.max_tokens
        smaller = plan.with_budget(budget)
        assert [u.groups for u in smaller.updates] == [u.groups for u in plan.updates]
        plan = smaller
    pytest.fail("it never ends")


def batch(rng: np.random.Generator, count: int) -> SequenceBatch:
    sequences = []
    for _ in range(count):
        size = int(rng.integers(1, 9))
        mask = np.concatenate([[0], rng.integers(0, 2, size - 1)]).astype(np.uint8)
        sequences.append(
            TrainSequence(np.arange(size, dtype=np.int32), mask, rng.normal(size=size).astype(np.float32))
        )
    return SequenceBatch.concatenate(sequences)


@given(seed=st.integers(0, 1000))
def test_scores_keep_their_tokens_when_sequences_are_packed_anew(seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = batch(rng, 5)
    scores = rng.normal(size=whole.tokens.shape[0]).astype(np.float32)
    weights = np.ones(5, np.float32)
    for indexes in ([0, 1, 2, 3, 4], [3, 1], [4], []):
        packed = replace(whole, proximal=scores).micro_batch(indexes, token_weights=weights)
        targets = whole.targets(indexes)
        if not packed.has_loss or targets.size == 0:
            assert packed.proximal_logprobs is None or targets.size == 0
            continue
        assert packed.target.tolist() == whole.tokens[targets].tolist()
        assert packed.old_logprobs.tolist() == whole.logprobs[targets].tolist()
        assert packed.proximal_logprobs is not None
        assert packed.proximal_logprobs.tolist() == scores[targets].tolist()


def test_collectives_that_were_made_are_left_out_once() -> None:
    dues, made = Dues(), []
    dues.begin(leave_out=2)
    outputs = [torch.ones(2) for _ in range(4)]
    for index, output in enumerate(outputs):
        dues.pay(lambda index=index: made.append(index), output)
    assert made == [2, 3]
    assert [bool(output.any()) for output in outputs] == [False, False, True, True]
    assert dues.made == 4


def test_a_collective_that_fails_is_not_taken_for_a_pass_that_does_not_fit() -> None:
    dues = Dues()
    dues.begin()

    def full() -> None:
        raise torch.OutOfMemoryError("none left for the collective itself")

    with pytest.raises(BrokenCollective, match="collective 1 of an update failed: none left") as caught:
        dues.pay(full, torch.ones(1))
    assert not is_out_of_memory(caught.value)
    with pytest.raises(BrokenCollective):
        Recovery(World(), []).attempt(lambda _: dues.pay(full, torch.ones(1)), dummy_batch(CPU))


def test_local_work_is_tried_twice_and_other_errors_pass() -> None:
    recovery, tries = Recovery(World(), []), []

    def short(times: int) -> Any:
        def work() -> float:
            tries.append(times)
            if len(tries) <= times:
                raise torch.OutOfMemoryError("none left")
            return 2.5

        return work

    assert recovery.together(short(1), what="it") == (2.5, 1)
    tries.clear()
    with pytest.raises(
        DoesNotFit, match=r"it: 1 of 1 ranks have no memory for it, twice; set trainer\.offload"
    ):
        recovery.together(short(9), what="it")

    def broken(_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        recovery.attempt(broken, dummy_batch(CPU))


def test_random_numbers_come_again() -> None:
    state = RandomState(CPU)
    state.mark()
    first = torch.rand(3)
    state.mark()
    state.restore()
    assert torch.equal(torch.rand(3), first)
    state.forget()
    state.mark()
    assert not torch.equal(torch.rand(3), first)


def test_peaks_of_all_ranks_side_by_side() -> None:
    mine = [MemoryPeaks(5, 9, 2), MemoryPeaks(7, 8, 1), MemoryPeaks()]
    rows = [over_ranks(peaks, rank=rank, size=3) for rank, peaks in enumerate(mine)]
    assert largest([sum(column) for column in zip(*rows, strict=True)]) == MemoryPeaks(7, 9, 2)


def test_the_peak_of_a_process_counts_what_was_let_go_of() -> None:
    meter = PeakMeter(CPU)
    meter.reset()
    before = meter.read().process
    grown = torch.ones(64 << 20, dtype=torch.uint8)
    del grown
    assert meter.read().process >= before + (48 << 20)


@pytest.mark.parametrize("place", ["forward", "head", "backward", "clip", "optimizer"])
def test_a_failed_try_leaves_nothing_behind(model_dir: Path, place: str) -> None:
    """One rank: losses and parameters as without the fault; the size that was found serves the next step."""
    clean, short = learner(model_dir), learner(model_dir, place)
    for step in (1, 2):
        ours, theirs = train(short, step), train(clean, step)
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        once = place in ("clip", "optimizer")
        assert ours.oom_retries == (0 if step == 2 else 1 if once else 2)
        assert ours.max_tokens == (1000 if once else 12)
    (bucket,) = clean.backend.plan_buckets(bucket_bytes=1 << 30, wire_dtype="float32")
    mine, other = short.backend.gather_bucket(bucket), clean.backend.gather_bucket(bucket)
    assert mine is not None
    assert other is not None
    torch.testing.assert_close(mine.view(torch.float32), other.view(torch.float32), rtol=0, atol=1e-6)


def learner(model_dir: Path, place: str = "") -> Learner:
    debug = {"enabled": True, "out_of_memory": place, "out_of_memory_tokens": 12}
    settings = TrainerSettings.model_validate(
        {"model_dir": str(model_dir), "initial_weights": "random", "debug": debug, "optimizer": {"lr": 1e-3}}
    )
    return Learner(FsdpBackend(settings, World()), Grpo())


def train(learner: Learner, step: int) -> Any:
    rng = np.random.default_rng(step)
    mask = np.array([0, 0, 1, 1, 1, 1], np.uint8)
    sequences = tuple(
        TrainSequence(rng.integers(0, 16, 6).astype(np.int32), mask, np.full(6, -2.7, np.float32) * mask)
        for _ in range(8)
    )
    plan = plan_step(step, [GroupInfo("g", (6,) * 8)], num_ranks=1, updates=1, max_tokens=1000)
    assert not learner.start_step(plan, {"g": TrainGroup(rng.normal(size=8), sequences)})
    return learner.make_update(0)


def test_faults_are_refused_unless_asked_for() -> None:
    with pytest.raises(ValidationError, match=r"set debug\.enabled = true if that is what you want"):
        TrainerSettings.model_validate({"model_dir": "m", "debug": {"out_of_memory": "head"}})
