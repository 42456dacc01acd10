"""Attention kernels, checkpointing and compilation change how a layer computes, never what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from milepost_trainer import attention
from milepost_trainer.attention import KERNELS
from milepost_trainer.batch import MicroBatch, SequenceBatch, TrainSequence
from milepost_trainer.layers import prepare_layers
from milepost_trainer.layout import PackedLayout
from milepost_trainer.policy import Policy, load_policy

# torch's own: the compiler imports what torch.jit has deprecated, and looks at gradients of any tensor
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

ROWS = ((7, 3, 20, 9), (5, 5, 30), (64,), (9, 12, 3, 3, 8))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _batch(seed: int, lengths: tuple[int, ...]) -> MicroBatch:
    rng = np.random.default_rng(seed)
    made: list[TrainSequence] = []
    for size in lengths:
        mask = np.zeros(size, np.uint8)
        mask[max(1, size // 3) :] = 1
        tokens = rng.integers(0, 16, size).astype(np.int32)
        made.append(TrainSequence(tokens=tokens, loss_mask=mask, logprobs=np.zeros(size, np.float32)))
    batch = SequenceBatch.concatenate(made)
    return batch.micro_batch(range(len(made)), token_weights=np.ones(len(made), np.float32))


def _outcome(policy: Policy, batch: MicroBatch) -> list[torch.Tensor]:
    policy.zero_grad()
    scores = policy(batch)
    scores.logprobs.square().sum().backward()
    return [scores.logprobs.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)]


def _load(model_dir: Path) -> Policy:
    return load_policy(model_dir, dtype=torch.float64, initial_weights="random", seed=1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_kernels_agree_in_results_and_gradients(kv_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    layout = PackedLayout.from_lengths([7, 1, 20, 9, 2])
    q = torch.randn(1, 4, 39, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, 39, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(1, 39, 4, 8, dtype=torch.float64)
    found = []
    for name in ("padded", "varlen"):
        out = KERNELS[name](q, k, v, layout, 0.3, window)
        found.append([out, *torch.autograd.grad((out.square() * weights).sum(), (q, k, v))])
    for padded, varlen in zip(*found, strict=True):
        torch.testing.assert_close(padded, varlen, rtol=0, atol=1e-12)


def test_the_operation_keeps_the_rules_of_custom_operations() -> None:
    """Schema, fake tensors, autograd: what compilers take for granted."""
    torch.manual_seed(0)
    layout = PackedLayout.from_lengths([3, 5])
    q = torch.randn(8, 4, 8, requires_grad=True)
    k, v = (torch.randn(8, 2, 8, requires_grad=True) for _ in range(2))
    arguments = (q, k, v, layout.cu_seqlens, layout.extent, 0.3, -1)
    torch.library.opcheck(torch.ops.milepost.packed_attention.default, arguments)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_nothing(model_dir: Path, checkpointing: str, every: int) -> None:
    plain, saved = _load(model_dir), _load(model_dir)
    prepare_layers(saved.layers, checkpointing=checkpointing, every=every)  # pyright: ignore[reportArgumentType]
    for seed, lengths in enumerate(ROWS):
        batch = _batch(seed, lengths)
        for ours, theirs in zip(_outcome(saved, batch), _outcome(plain, batch), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_layers_agree_and_share_one_compilation(model_dir: Path, checkpointing: str) -> None:
    """Rows of other lengths, other numbers of sequences: no graph break, nothing compiled anew."""
    plain, compiled = _load(model_dir), _load(model_dir)
    prepare_layers(
        compiled.layers,
        checkpointing=checkpointing,  # pyright: ignore[reportArgumentType]
        compiled=True,
        compiler="aot_eager",
    )
    for seed, lengths in enumerate(ROWS):
        batch = _batch(seed, lengths)
        for ours, theirs in zip(_outcome(compiled, batch), _outcome(plain, batch), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_compiled_without_attention_of_ours_would_leak(model_dir: Path) -> None:
    """The control: the compiled layer does look at the layout that it is given."""
    compiled = _load(model_dir)
    prepare_layers(compiled.layers, compiled=True, compiler="aot_eager")
    batch = _batch(0, (6, 6))
    wrong = replace(batch, layout=PackedLayout.from_lengths([batch.num_fed]))
    assert (compiled(batch).logprobs - compiled(wrong).logprobs).abs().max() > 1e-4


@pytest.mark.slow
def test_the_default_compiler_agrees(model_dir: Path) -> None:
    """Inductor's own code; it adds up norms, which are float32 in any case, in another order."""
    plain, compiled = _load(model_dir), _load(model_dir)
    prepare_layers(compiled.layers, compiled=True)
    for seed, lengths in enumerate(ROWS[:2]):
        batch = _batch(seed, lengths)
        for ours, theirs in zip(_outcome(compiled, batch), _outcome(plain, batch), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_half_precision_on_the_cpu_stays_with_rectangles() -> None:
    assert attention.choose_kernel(torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)) == "padded"
