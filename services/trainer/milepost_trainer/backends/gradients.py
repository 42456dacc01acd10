"""The norm and the scale of gradients, shard by shard: no collective, so that ranks can agree in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor


def squared_norm(parameters: Sequence[torch.Tensor]) -> float:
    """Squared L2 norm of this rank's part of the gradients; ranks add theirs up."""
    gradients = _local_gradients(parameters)
    if not gradients:
        return 0.0
    exact = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = torch._foreach_norm(gradients, 2.0, dtype=exact)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
    return torch.stack(norms).double().square().sum().item()


def scale_gradients(parameters: Sequence[torch.Tensor], scale: float) -> None:
    """Multiply this rank's part of the gradients by a scale, in place; a scale of 1 or more leaves them."""
    if scale < 1 and (gradients := _local_gradients(parameters)):
        torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]


def _local_gradients(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    found = (parameter.grad for parameter in parameters if parameter.grad is not None)
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in found]
