"""Kernels on CUDA: no further from float64 than the plain path in the same precision is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from milepost_trainer.attention import KERNELS, choose_kernel
from milepost_trainer.head import score_tokens
from milepost_trainer.layout import PackedLayout

M, H, V = 333, 256, 20011  # no power of two, several blocks of the vocabulary
NOISE = 1.25


def _error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def _plain_scores(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, heat: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores = torch.log_softmax(logits if heat is None else logits / heat[:, None], -1)
    return scores.gather(-1, target[:, None])[:, 0], -(scores.exp() * scores).sum(-1)


def _with_gradients(
    outputs: tuple[torch.Tensor, torch.Tensor | None], leaves: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    logprobs, entropy = outputs
    assert entropy is not None
    slopes = torch.linspace(-1, 1, M, device="cuda", dtype=torch.float64)
    loss = (logprobs * slopes.to(logprobs.dtype)).sum() + (0.1 * entropy.square()).sum()
    return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heated", [False, True])
@pytest.mark.parametrize("chunk", [100, 333, 4096])
def test_head(dtype: torch.dtype, heated: bool, chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(M, H, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(V, H, device="cuda") / 8).to(dtype).requires_grad_()
    target = torch.randint(0, V, (M,), device="cuda")
    heat = torch.rand(M, device="cuda") + 0.5 if heated else None
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth = _with_gradients(_plain_scores(exact[0], exact[1], target, heat), exact)
    plain = _with_gradients(_plain_scores(hidden, weight, target, heat), (hidden, weight))
    scored = score_tokens(
        hidden, weight, target=target, temperature=heat, chunk_tokens=chunk, with_entropy=True
    )
    fused = _with_gradients((scored.logprobs, scored.entropy), (hidden, weight))
    for name, ours, theirs, wanted in zip(
        ("logprobs", "entropy", "dH", "dW"), fused, plain, truth, strict=True
    ):
        assert _error(ours, wanted) <= NOISE * _error(theirs, wanted) + 1e-6, name


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("window", [None, 100])
def test_attention(head_dim: int, kv_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    lengths = [700, 1, 33, 256, 1024]
    rows = sum(lengths)
    layout = PackedLayout.from_lengths(lengths, device=torch.device("cuda"))
    exact = [torch.randn(1, n, rows, head_dim, device="cuda").double() for n in (8, kv_heads, kv_heads)]
    slopes = torch.randn(1, rows, 8, head_dim, device="cuda")

    def run(kernel: str, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (tensor.to(torch.bfloat16).to(dtype).requires_grad_() for tensor in exact)
        out = KERNELS[kernel](q, k, v, layout, None, window)
        return [out.detach(), *torch.autograd.grad((out * slopes.to(dtype)).sum(), (q, k, v))]

    assert choose_kernel(exact[0].to(torch.bfloat16)) == "varlen"
    truth, plain = run("padded", torch.float64), run("padded", torch.bfloat16)
    for name, ours, theirs, wanted in zip("oqkv", run("varlen", torch.bfloat16), plain, truth, strict=True):
        assert _error(ours, wanted) <= NOISE * _error(theirs, wanted) + 1e-3, name
