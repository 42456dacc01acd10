"""The plain loop that the trainer is measured against: what one writes first, with the library's own parts.

    micro-batch --padded to its longest sequence--> Hugging Face model, sdpa --> all logits --> log-softmax
    --> the same objective --> backward;  clip, torch's AdamW

Weights and optimizer are in the compute dtype: the least memory and the least work that such a loop gets away
with. Padding lies to the right and there is no mask, so that sdpa takes its causal flash kernel. It reports
no entropy. With activation checkpointing it uses the library's, on every layer.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from milepost_trainer.batch import MicroBatch
from milepost_trainer.buckets import DTYPES
from milepost_trainer.head import TokenScores
from milepost_trainer.objectives.base import Objective
from milepost_trainer.policy import load_lm
from milepost_trainer.settings import TrainerSettings


class PlainLoop:
    """A Hugging Face model, an optimizer, and nothing else."""

    def __init__(
        self, folder: Path, settings: TrainerSettings, objective: Objective, device: torch.device
    ) -> None:
        """Load the model onto the device.

        Args:
            folder: with its config and, unless they are drawn, its weights.
            settings: the trainer's; the same seed draws the same weights.
            objective: the same as the trainer's.
            device: where it all happens.
        """
        lm = load_lm(
            folder,
            implementation="sdpa",
            dtype=DTYPES[settings.dtype],
            initial_weights=settings.initial_weights,
            seed=settings.seed,
            device=device,
        )
        self._model = lm.to(device=device, dtype=DTYPES[settings.compute_dtype or settings.dtype]).train()
        if settings.fsdp.activation_checkpointing != "none":
            cast(Any, self._model).gradient_checkpointing_enable({"use_reentrant": False})
        self._objective = objective
        self._max_norm = settings.optimizer.max_grad_norm
        adam = settings.optimizer
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=adam.lr,
            betas=adam.betas,
            eps=adam.eps,
            weight_decay=adam.weight_decay,
        )

    def update(self, batches: Sequence[MicroBatch]) -> tuple[float, float]:
        """One optimizer update; returns loss and gradient norm."""
        losses = [self._train(batch) for batch in batches]
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(torch.stack(losses).sum()), float(norm)

    def forget(self) -> None:
        """Drop the gradients of an update that ran out of memory."""
        self._optimizer.zero_grad(set_to_none=True)
        gc.collect()

    def _train(self, batch: MicroBatch) -> torch.Tensor:
        cells, padded = pad(batch)
        logits = cast(Any, self._model)(input_ids=padded, use_cache=False).logits
        scores = torch.log_softmax(logits.float(), -1)
        targets = torch.zeros_like(padded).view(-1).index_copy(0, cells[batch.source], batch.target)
        logprobs = scores.gather(-1, targets.view_as(padded)[..., None]).view(-1)[cells[batch.source]]
        token_loss = self._objective.token_loss(batch, TokenScores(logprobs, None)).loss
        loss = (token_loss * batch.weights).sum()
        loss.backward()
        return loss.detach()


def pad(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpack a row into a rectangle.

    Returns:
        int64 [T] the cell of each token, and int64 [sequences, longest] the tokens.
    """
    lengths = batch.layout.lengths
    longest = max(lengths)
    ids = batch.input_ids[0]
    rows = torch.repeat_interleave(
        torch.arange(len(lengths), device=ids.device), torch.tensor(lengths, device=ids.device)
    )
    cells = rows * longest + batch.position_ids[0]
    padded = torch.zeros(len(lengths) * longest, dtype=ids.dtype, device=ids.device)
    return cells, padded.index_copy(0, cells, ids).view(len(lengths), longest)
