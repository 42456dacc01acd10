"""Attention of packed sequences: one function of ours behind every Hugging Face architecture.

    model layer --(q, k, v of the packed row, layout)--> attend() --> block-diagonal causal attention

transformers asks two tables by the name in ``config._attn_implementation``: one for the attention function,
one for the mask. Both entries are ours. The mask entry answers "none", because the layout says all there is
to say, and the attention entry refuses to run without a layout: with the library's defaults, position ids
that restart leak in silence from one packed sequence into the next as soon as a cache is around.

A kernel is any callable with the signature of ``padded_causal``; ``KERNELS`` maps names to them:

| name | where it is taken | how |
|---|---|---|
| ``varlen`` | CUDA in half precision; compiled on the CPU | the row as it is (``attention_varlen``) |
| ``padded`` | everywhere else | rectangles of like lengths through torch's attention |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from milepost_trainer import attention_varlen
from milepost_trainer.layout import PackedLayout, PaddedBlock

ATTENTION_NAME = "milepost_packed"

Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, PackedLayout, float | None, int | None], torch.Tensor
]

_REFUSED = ("softcap", "s_aux")  # variants of attention that the kernels do not implement


def register() -> str:
    """Enter our functions in both tables of transformers (again and again is fine).

    Returns:
        The name to load models with (``attn_implementation=``).
    """
    AttentionInterface.register(ATTENTION_NAME, attend)
    AttentionMaskInterface.register(ATTENTION_NAME, no_mask)
    return ATTENTION_NAME


def no_mask(*_args: Any, **_kwargs: Any) -> None:
    """The mask of a packed row: none, the layout carries it."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each packed sequence, causally.

    Args:
        module: the attention layer (its ``training`` flag and names serve error messages).
        query: [1, heads, T, head_dim].
        key: [1, kv_heads, T, head_dim]; ``heads`` is a multiple of ``kv_heads``.
        value: like ``key``.
        attention_mask: must be None.
        scaling: factor on the scores, default ``head_dim ** -0.5``.
        dropout: must be 0: the trainer's forward pass is deterministic.
        sliding_window: how many positions a token sees, itself included; None for all.
        layout: where sequences start, handed down as a keyword of the model's forward.
        kwargs: what else the architecture passes; variants we do not implement are refused.

    Returns:
        [1, T, heads, head_dim] and None for the weights.

    Raises:
        ValueError: a mask came along, the layout is missing or does not fit the row.
        NotImplementedError: the architecture asks for dropout, soft-capping or attention sinks.
    """
    if layout is None:
        raise ValueError("layout is missing: call the model with layout=PackedLayout(...); packing needs it")
    if attention_mask is not None:
        raise ValueError(
            "attention_mask is set: a packed row has none, its layout says what may attend to what"
        )
    if not torch.compiler.is_compiling():  # the number would be compiled in
        _check_fit(query, key, layout)
    unknown = [name for name in _REFUSED if kwargs.get(name) is not None]
    if unknown or dropout:
        asked = ", ".join(unknown) or f"attention_dropout={dropout}"
        raise NotImplementedError(
            f"{type(module).__name__} asks for {asked}, which packed attention does not do"
        )
    return KERNELS[choose_kernel(query)](query, key, value, layout, scaling, sliding_window), None


def choose_kernel(query: torch.Tensor) -> str:
    """The name of the kernel that a layer with such queries takes."""
    opaque = torch.compiler.is_compiling() and not query.is_cuda
    return "varlen" if opaque or attention_varlen.supports(query) else "padded"


def _check_fit(query: torch.Tensor, key: torch.Tensor, layout: PackedLayout) -> None:
    covered = layout.num_tokens
    if query.shape[0] != 1 or query.shape[2] != covered or key.shape[2] != covered:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit a layout of {covered} tokens; "
            "lay all sequences in one row"
        )


def variable_lengths(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attend along the packed row by one operation that knows where sequences end.

    Returns:
        [1, T, heads, head_dim].
    """
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, head_dim]
    return attention_varlen.packed_attention(
        q,
        k,
        v,
        cu_seqlens=layout.cu_seqlens,
        extent=layout.extent,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
    )[None]


def padded_causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attend by rectangles of like lengths. Padding lies to the right, where a causal mask never looks.

    Returns:
        [1, T, heads, head_dim].
    """
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, head_dim]
    parts = [_attend_block(q, k, v, block, scaling, sliding_window) for block in layout.blocks]
    if layout.restore is None:
        return parts[0][None]
    return torch.cat(parts).index_select(0, layout.restore)[None]


def _attend_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block: PaddedBlock,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention of one rectangle; returns [t, heads, head_dim] for the block's rows."""
    heads, kv_heads = q.shape[1], k.shape[1]
    q, k, v = (_rectangle(tensor, block) for tensor in (q, k, v))  # [n, heads, L, head_dim]
    if heads != kv_heads:
        k, v = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (k, v))
    band = None
    if sliding_window is not None and sliding_window < block.length:
        distance = torch.arange(block.length, device=q.device)
        distance = distance[:, None] - distance[None]
        band = (distance >= 0) & (distance < sliding_window)
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=band, is_causal=band is None, scale=scaling
    )
    flat = out.transpose(1, 2).reshape(block.num_sequences * block.length, heads, -1)
    return flat if block.cells is None else flat.index_select(0, block.cells)


def _rectangle(tensor: torch.Tensor, block: PaddedBlock) -> torch.Tensor:
    """[T, heads, head_dim] -> [n, heads, L, head_dim]."""
    cells = tensor.shape[0] if block.cells is None else -1
    picked = tensor if cells == block.gather.numel() else tensor.index_select(0, block.gather)
    return picked.reshape(block.num_sequences, block.length, tensor.shape[1], -1).transpose(1, 2)


KERNELS: dict[str, Kernel] = {
    "padded": cast(Kernel, torch.compiler.disable(padded_causal)),
    "varlen": variable_lengths,
}
