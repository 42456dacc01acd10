# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# (Triton is there only where torch has CUDA, and its language is typed for the compiler alone.)
"""Triton kernels of the LM head: one pass over a chunk of logits each way. Formulas: see ``head``.

Imported on CUDA only. A program of ``_score`` owns one row; of ``_grad`` one block of one row, in place.
Logits may be of any float dtype of at most 32 bits; arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROW_BLOCK = 8192
_GRAD_BLOCK = 4096


@triton.jit
def _score(
    logits,
    target,
    temperature,
    logprobs,
    lse,
    entropy,
    stride,
    vocabulary: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Online log-sum-exp (arXiv 1805.02867, algorithm 3), with the sum of p z beside it."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    inverse = 1.0
    if HAS_TEMPERATURE:
        inverse = 1.0 / tl.load(temperature + row)
    top = -float("inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        real = column < vocabulary
        z = tl.load(base + column, mask=real, other=-float("inf")).to(tl.float32) * inverse
        higher = tl.maximum(top, tl.max(z, 0))
        shrink = tl.exp(top - higher)
        share = tl.exp(z - higher)
        total = total * shrink + tl.sum(share, 0)
        if WITH_ENTROPY:
            weighted = weighted * shrink + tl.sum(tl.where(real, share * z, 0.0), 0)
        top = higher
    whole = top + tl.log(total)
    chosen = tl.load(base + tl.load(target + row)).to(tl.float32) * inverse
    tl.store(logprobs + row, chosen - whole)
    tl.store(lse + row, whole)
    if WITH_ENTROPY:
        tl.store(entropy + row, whole - weighted / total)


@triton.jit
def _grad(
    logits,
    target,
    temperature,
    lse,
    entropy,
    grad_logprobs,
    grad_entropy,
    stride,
    vocabulary: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    OF_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite a block of logits with the gradient of the loss."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < vocabulary
    place = logits + row * stride + column
    inverse = 1.0
    if HAS_TEMPERATURE:
        inverse = 1.0 / tl.load(temperature + row)
    z = tl.load(place, mask=real, other=0.0).to(tl.float32) * inverse
    score = z - tl.load(lse + row)
    probability = tl.exp(score)
    weight = tl.load(grad_logprobs + row)
    slope = tl.where(column == tl.load(target + row), weight, 0.0) - probability * weight
    if OF_ENTROPY:
        slope -= probability * (score + tl.load(entropy + row)) * tl.load(grad_entropy + row)
    tl.store(place, (slope * inverse).to(logits.dtype.element_ty), mask=real)


def score(
    logits: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor | None, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Log-probs, log-sum-exps and entropies of the rows of ``logits`` [C, V]; each float32 [C]."""
    count, vocabulary = logits.shape
    logprobs, lse = (torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(2))
    entropy = torch.empty_like(lse) if with_entropy else None
    _score[(count,)](
        logits,
        target.contiguous(),
        _there(temperature, lse),
        logprobs,
        lse,
        _there(entropy, lse),
        logits.stride(0),
        vocabulary,
        HAS_TEMPERATURE=temperature is not None,
        WITH_ENTROPY=with_entropy,
        BLOCK=_ROW_BLOCK,
        num_warps=16,
    )
    return logprobs, lse, entropy


def grad_(
    logits: torch.Tensor,
    target: torch.Tensor,
    temperature: torch.Tensor | None,
    lse: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """Overwrite ``logits`` with the gradient of the loss with respect to them, and return it."""
    count, vocabulary = logits.shape
    _grad[(count, triton.cdiv(vocabulary, _GRAD_BLOCK))](
        logits,
        target.contiguous(),
        _there(temperature, lse),
        lse,
        _there(entropy, lse),
        grad_logprobs.float().contiguous(),
        lse if grad_entropy is None else grad_entropy.float().contiguous(),
        logits.stride(0),
        vocabulary,
        HAS_TEMPERATURE=temperature is not None,
        OF_ENTROPY=grad_entropy is not None,
        BLOCK=_GRAD_BLOCK,
        num_warps=8,
    )
    return logits


def _there(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """A kernel needs some pointer for what its switches leave unread."""
    return stand_in if tensor is None else tensor.contiguous()
