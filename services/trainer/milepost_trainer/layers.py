"""What happens to each decoder layer before it is sharded: activation checkpointing, compilation.

    layer(...)  --hooks of FSDP-->  layer.forward = compiled( checkpointed( the architecture's forward ))

Only ``forward`` of the instance is replaced: names of parameters stay, and hooks that gather and free weights
run outside of what is compiled. All layers of one class share one compilation (dynamo keeps it by code, and
the code is the class's), for any number of tokens (``dynamic=True``): the first micro-batch pays, once.

| checkpointing | kept for the backward pass | computed again |
|---|---|---|
| none | what the operations ask for | nothing (compiled: what is cheaper to redo than to read) |
| selective | results of matrix products and of attention | all between them |
| full | the layer's input | everything |
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from milepost_trainer import attention_varlen

Checkpointing = Literal["none", "selective", "full"]
Forward = Callable[..., Any]


def prepare_layers(
    layers: Iterable[nn.Module],
    *,
    checkpointing: Checkpointing = "none",
    every: int = 1,
    compiled: bool = False,
    compiler: str = "inductor",
) -> None:
    """Replace the forward of each layer; call it before sharding, once.

    Args:
        layers: the decoder's, in order.
        checkpointing: what is kept for the backward pass.
        every: of every n-th layer; the others keep all.
        compiled: hand the forward to torch.compile.
        compiler: backend of torch.compile.
    """
    for index, layer in enumerate(layers):
        forward: Forward = layer.forward
        if checkpointing != "none" and index % every == 0:
            forward = types.MethodType(_CHECKPOINTED[checkpointing], layer)
        if compiled:
            forward = torch.compile(forward, dynamic=True, backend=compiler)
        if forward is not layer.forward:
            cast(Any, layer).forward = forward


def _full(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The class's forward, computed again in the backward pass."""
    forward = functools.partial(type(self).forward, self)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _selective(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The class's forward, of which only what is cheap is computed again."""
    forward = functools.partial(type(self).forward, self)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=_keep_products,
        **kwargs,
    )


_CHECKPOINTED: dict[str, Forward] = {"full": _full, "selective": _selective}


def _keep_products() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_ctx: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def _expensive() -> frozenset[Any]:
    aten: Any = torch.ops.aten
    attention: Any = torch.ops.milepost.packed_attention
    assert attention_varlen.packed_attention, "imported for the operation that it registers"
    return frozenset(
        {
            aten.mm.default,
            aten.addmm.default,
            aten.bmm.default,
            aten.linear.default,
            attention.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
        }
    )


_EXPENSIVE = _expensive()
