"""Out of memory by order, to rehearse what happens then: `[trainer.debug]`.

    forward    before the middle layer of a forward pass
    head       after the decoder, before the LM head
    backward   when the backward pass reaches the middle layer
    clip       in the gradient norm, once
    optimizer  when the optimizer is about to move the parameters, once

The first three strike passes of more than so many tokens, as a real limit would; nothing else of the passes
changes. Installed only where it was asked for.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from milepost_trainer.policy import Policy
from milepost_trainer.settings import DebugSettings

_eager: Any = torch.compiler.disable  # hooks of compiled layers stay Python


class Faults:
    """Raises ``torch.OutOfMemoryError`` on this rank where the settings say."""

    def __init__(self, settings: DebugSettings, *, rank: int) -> None:
        self._place = settings.out_of_memory if settings.out_of_memory_rank in (rank, -1) else ""
        self._tokens = settings.out_of_memory_tokens
        self._struck = False

    def install(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Hook into the modules and the optimizer; nothing where no fault is ordered."""
        middle = policy.layers[len(policy.layers) // 2]
        if self._place == "forward":
            middle.register_forward_pre_hook(_eager(self._before), with_kwargs=True)
        elif self._place == "head":
            decoder = cast(Any, policy.lm).get_decoder()
            decoder.register_forward_hook(self._after_decoder)
        elif self._place == "backward":
            middle.register_forward_hook(_eager(self._when_backward))
        elif self._place == "optimizer":
            optimizer.register_step_pre_hook(self._before_moving)

    def clipping(self) -> None:
        """The gradient norm is about to be computed."""
        if self._place == "clip":
            self._once()

    def _before_moving(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._once()

    def _after_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        self._strike(output.last_hidden_state)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._strike(args[0] if args else kwargs["hidden_states"])

    def _when_backward(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad and self._is_too_large(hidden):
            hidden.register_hook(self._in_backward)

    def _in_backward(self, gradient: torch.Tensor) -> None:
        self._raise()

    def _strike(self, hidden: torch.Tensor) -> None:
        if self._is_too_large(hidden):
            self._raise()

    def _is_too_large(self, hidden: torch.Tensor) -> bool:
        return hidden.shape[-2] > self._tokens

    def _once(self) -> None:
        if not self._struck:
            self._struck = True
            self._raise()

    def _raise(self) -> None:
        raise torch.OutOfMemoryError(f"out of memory by order of trainer.debug, in {self._place}")
