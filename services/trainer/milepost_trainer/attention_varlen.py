"""Attention with variable lengths: the packed row as it is, no padding, as one operation that compiles.

    milepost::packed_attention   q [T, heads, d], k and v [T, kv_heads, d], cu_seqlens, extent -> out, lse
    milepost::packed_attention_backward                                                 -> dq, dk, dv

On CUDA these are torch's flash kernels for half precision, the ones behind ``torch.nn.attention.varlen``
(flash-attention 3 where ``activate_flash_attention_impl`` put it there). They are called one level below that
module because its functions take the longest length as a number: a compiled layer would be compiled again for
every new one, while ``extent`` is a tensor on the host and costs no synchronisation. Elsewhere the formulas
stand as they are, sequence by sequence: slow, exact, and the same operation to compilers and checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import torch

_LARGEST_HEAD = 256  # of the flash kernels


def supports(query: torch.Tensor) -> bool:
    """Whether the fast kernels take such a tensor."""
    head_dim = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and head_dim % 8 == 0 and head_dim <= _LARGEST_HEAD


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    extent: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Attend within each sequence of a packed row, causally.

    Args:
        query: [T, heads, head_dim].
        key: [T, kv_heads, head_dim].
        value: like ``key``.
        cu_seqlens: int32 [S + 1].
        extent: int32 [1] on the host, the longest sequence.
        scale: factor on the scores.
        window: how many positions a token sees, itself included; None for all.

    Returns:
        [T, heads, head_dim].
    """
    left = -1 if window is None else window - 1
    operation = torch.ops.milepost.packed_attention
    return cast(Any, operation)(query, key, value, cu_seqlens, extent, scale, left)[0]


@torch.library.custom_op(
    "milepost::packed_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor extent, float scale, int left)"
    " -> (Tensor, Tensor)",
)
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    extent: torch.Tensor,
    scale: float,
    left: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not query.is_cuda:
        return _plain_forward(query, key, value, cu_seqlens, scale, left)
    longest = int(extent)
    flash = cast(Any, torch.ops.aten._flash_attention_forward)
    out, lse, *_ = flash(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        0.0,
        left < 0,  # causal; a window that ends at the token itself says so too
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=0,
    )
    return out, lse


@torch.library.custom_op(
    "milepost::packed_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor cu_seqlens,"
    " Tensor extent, float scale, int left) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    extent: torch.Tensor,
    scale: float,
    left: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not query.is_cuda:
        return _plain_backward(grad, query, key, value, out, lse, cu_seqlens, scale, left)
    longest = int(extent)
    flash = cast(Any, torch.ops.aten._flash_attention_backward)
    return flash(
        grad.contiguous(),
        query,
        key,
        value,
        out,
        lse,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        0.0,
        left < 0,
        torch.zeros(2, dtype=torch.uint64, device=query.device),  # of dropout, which there is none of
        torch.empty(0, device=query.device),
        scale=scale,
        window_size_left=left,
        window_size_right=0,
    )


@_forward.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    extent: torch.Tensor,
    scale: float,
    left: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    del key, value, cu_seqlens, extent, scale, left
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.empty_like(query), query.new_empty((query.shape[1], query.shape[0]), dtype=exact)


@_backward.register_fake
def _(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del grad
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, cu_seqlens, extent, scale, left = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens, extent)
    ctx.scale, ctx.left = scale, left


def _differentiate(ctx: Any, grad: torch.Tensor, _grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, cu_seqlens, extent = ctx.saved_tensors
    operation = cast(Any, torch.ops.milepost.packed_attention_backward)
    grads = operation(grad, query, key, value, out, lse, cu_seqlens, extent, ctx.scale, ctx.left)
    return *grads, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


# ------------------------------------------------------------------------------ where there is no fast kernel


def _plain_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    left: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(query)
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=exact)
    for cut in _sequences(cu_seqlens):
        scores = _scores(query[cut], key[cut], scale, left)
        lse[:, cut] = scores.logsumexp(-1)
        shares = (scores - lse[:, cut, None]).exp()
        spread = _for_heads(value[cut], query.shape[1])
        out[cut] = (shares @ spread).transpose(0, 1).to(out.dtype)
    return out, lse


def _plain_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    left: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients by the formulas of flash-attention (arXiv 2205.14135, appendix B.4)."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    heads, kv_heads = query.shape[1], key.shape[1]
    for cut in _sequences(cu_seqlens):
        q, slope, result = (_for_heads(t[cut], heads) for t in (query, grad, out))
        k, v = (_for_heads(t[cut], heads) for t in (key, value))
        shares = (_scores(query[cut], key[cut], scale, left) - lse[:, cut, None]).exp()
        inner = shares * (slope @ v.transpose(1, 2) - (slope * result).sum(-1, keepdim=True)) * scale
        parts = inner @ k, inner.transpose(1, 2) @ q, shares.transpose(1, 2) @ slope
        for total, part, of in zip(grads, parts, (heads, kv_heads, kv_heads), strict=True):
            folded = part.unflatten(0, (of, heads // of)).sum(1)
            total[cut] = folded.transpose(0, 1).to(total.dtype)
    return grads


def _sequences(cu_seqlens: torch.Tensor) -> Iterator[slice]:
    return (slice(start, end) for start, end in pairwise(cu_seqlens.tolist()))


def _for_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[L, kv_heads, d] -> [heads, L, d] in float32 or float64."""
    exact = tensor if tensor.dtype == torch.float64 else tensor.float()
    return exact.transpose(0, 1).repeat_interleave(heads // tensor.shape[1], dim=0)


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float, left: int) -> torch.Tensor:
    """[heads, L, L] scaled scores of one sequence, minus infinity where a token may not look."""
    heads = query.shape[1]
    scores = _for_heads(query, heads) @ _for_heads(key, heads).transpose(1, 2) * scale
    place = torch.arange(query.shape[0], device=query.device)
    distance = place[:, None] - place[None]
    hidden = (distance < 0) | (distance > left) if left >= 0 else distance < 0
    return scores.masked_fill(hidden, -torch.inf)
