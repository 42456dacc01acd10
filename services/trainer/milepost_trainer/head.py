"""The LM head, fused with what is read from its logits: log-prob and entropy of each predicted token.

    chunk of [C, H] --matmul--> logits [C, V] --one pass--> log-prob, log-sum-exp, entropy [C]
           dlogits, in place of the logits --two matmuls--> dH [C, H], dW += [V, H]

Shapes: M predicted tokens, C tokens of a chunk, H hidden size, V vocabulary. Logits exist for one chunk at a
time and in the dtype of the weights. The second line belongs to the backward pass, which computes the logits
again (but those of the last chunk, which wait for it). A caller that can tell the loss's slope from a chunk's
log-probs alone has it done in the forward pass, while the logits are there: one product less of four.
``dW`` is added up in float32 whatever the dtype, so results do not depend on the chunk size beyond
rounding. On CUDA the pass over the logits is one Triton kernel each way (``head_kernels``), elsewhere plain
torch with the same formulas:

    z = logits / temperature        lse = log sum_j exp z_j        p_j = exp(z_j - lse)
    log-prob = z_y - lse            entropy = lse - sum_j p_j z_j
    d log-prob / dz_j = [j = y] - p_j               d entropy / dz_j = -p_j (z_j - lse + entropy)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TokenScores:
    """What the policy says of each predicted token.

    Attributes:
        logprobs: float32 [M], nats, at the sampling temperature (float64 under float64 weights).
        entropy: like ``logprobs``, nats, with gradient; None when not asked for.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


@dataclass(frozen=True)
class RowScores:
    """What one pass over a chunk's logits yields; each [C], float32 or float64.

    Attributes:
        logprobs: of the targets.
        lse: log-sum-exp, which the backward pass needs.
        entropy: None when not asked for.
    """

    logprobs: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None


Slope = Callable[[slice, RowScores], torch.Tensor]
"""Gradient of the loss with respect to the log-probs of the tokens in a slice, [C], from their scores."""


def score_tokens(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    chunk_tokens: int = 4096,
    with_entropy: bool = False,
    slope: Slope | None = None,
) -> TokenScores:
    """Log-softmax of ``hidden @ weight.T / temperature`` at the target tokens, chunk by chunk.

    Args:
        hidden: [M, H] hidden states that predict.
        weight: [V, H] of the LM head.
        target: int64 [M].
        bias: [V] or None.
        temperature: float32 [M] or None for 1.
        chunk_tokens: tokens whose logits exist at once.
        with_entropy: also return the entropy of each position; its gradient costs nothing unless used.
        slope: of the loss that will be differentiated, and of no other: the gradients that the backward pass
            hands out are made from it. Entropies then have none.

    Returns:
        Scores of all M tokens.
    """
    options = (chunk_tokens, with_entropy, slope)
    return TokenScores(*cast(Any, _Scores).apply(hidden, weight, bias, target, temperature, *options))


class _Scores(torch.autograd.Function):
    """See the module: [M, H] and [V, H] in, log-probs and entropies out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        temperature: torch.Tensor | None,
        chunk_tokens: int,
        with_entropy: bool,
        slope: Slope | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        wanted: tuple[bool, ...] = ctx.needs_input_grad
        early = _Sums.of(hidden, weight, bias, wanted) if slope is not None and any(wanted) else None
        cuts = list(_cuts(hidden.shape[0], chunk_tokens))
        rows: list[RowScores] = []
        logits: torch.Tensor | None = None
        for cut in cuts:
            del logits  # before the next chunk's exist
            logits = nn.functional.linear(hidden[cut], weight, bias)
            heat = _of(temperature, cut)
            rows.append(score_rows(logits, target[cut], heat, with_entropy=with_entropy))
            if early is not None and slope is not None:
                steep = slope(cut, rows[-1]).detach()
                early.add(
                    cut, grad_rows_(logits, target[cut], heat, rows[-1], steep, None), hidden[cut], weight
                )
        lse = torch.cat([row.lse for row in rows])
        entropy = torch.cat([cast(torch.Tensor, row.entropy) for row in rows]) if with_entropy else None
        ctx.set_materialize_grads(False)
        ctx.cuts, ctx.early = cuts, early is not None
        if early is not None:
            ctx.save_for_backward(*early.grads(weight))
        else:
            kept = logits if any(wanted) else None
            ctx.save_for_backward(hidden, weight, bias, target, temperature, lse, entropy, kept)
        return torch.cat([row.logprobs for row in rows]), entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 8
        if ctx.early:
            if grad_entropy is not None:
                raise RuntimeError(
                    "the loss depends on entropies: leave slope out, which knows log-probs alone"
                )
            return *ctx.saved_tensors, None, None, None, None, None
        hidden, weight, bias, target, temperature, lse, entropy, kept = ctx.saved_tensors
        wanted: tuple[bool, ...] = ctx.needs_input_grad
        grad_logprobs = torch.zeros_like(lse) if grad_logprobs is None else grad_logprobs
        sums = _Sums.of(hidden, weight, bias, wanted)
        for cut in reversed(cast(list[slice], ctx.cuts)):
            logits = kept if kept is not None else nn.functional.linear(hidden[cut], weight, bias)
            kept = None
            slope = grad_rows_(
                logits,
                target[cut],
                _of(temperature, cut),
                RowScores(grad_logprobs[cut], lse[cut], _of(entropy, cut)),
                grad_logprobs[cut],
                _of(grad_entropy, cut),
            )
            sums.add(cut, slope, hidden[cut], weight)
            del logits, slope
        return *sums.grads(weight), None, None, None, None, None


@dataclass
class _Sums:
    """Gradients as they add up over chunks; None where nobody asked."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def of(
        cls, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: tuple[bool, ...]
    ) -> _Sums:
        exact = torch.float32 if weight.dtype in _HALF else weight.dtype
        return cls(
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros_like(weight, dtype=exact) if wanted[1] else None,
            torch.zeros_like(bias, dtype=exact) if wanted[2] and bias is not None else None,
        )

    def add(self, cut: slice, slope: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        """Take in one chunk: ``slope`` is the gradient of its logits, [C, V]."""
        if self.hidden is not None:
            torch.mm(slope, weight, out=self.hidden[cut])
        if self.weight is not None:
            _add_product_(self.weight, slope.t(), hidden)
        if self.bias is not None:
            self.bias += slope.sum(0, dtype=self.bias.dtype)

    def grads(self, weight: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of hidden, weight and bias, in their own dtype."""
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None else self.bias.to(weight.dtype),
        )


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right``; a float32 total takes products of half precision without rounding them."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    elif total.is_cuda:
        cast(Any, torch.addmm)(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left.to(total.dtype) @ right.to(total.dtype)


def _cuts(size: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(size, start + chunk)) for start in range(0, max(1, size), chunk))


def _of(tensor: torch.Tensor | None, cut: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[cut]


# ---------------------------------------------------------------------- the passes over one chunk's logits


def score_rows(
    logits: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor | None, *, with_entropy: bool
) -> RowScores:
    """Read a chunk of logits once.

    Args:
        logits: [C, V].
        target: int64 [C].
        temperature: [C] or None.
        with_entropy: also compute entropies.
    """
    if _has_kernels(logits):
        from milepost_trainer import head_kernels

        return RowScores(*head_kernels.score(logits, target, temperature, with_entropy))
    scores = _scaled(logits, temperature)
    lse = scores.logsumexp(-1)
    logprobs = scores.gather(-1, target[:, None])[:, 0] - lse
    if not with_entropy:
        return RowScores(logprobs, lse, None)
    probabilities = (scores - lse[:, None]).exp()
    return RowScores(logprobs, lse, lse - (probabilities * scores).sum(-1))


def grad_rows_(
    logits: torch.Tensor,
    target: torch.Tensor,
    temperature: torch.Tensor | None,
    rows: RowScores,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """Turn a chunk of logits into the gradient of the loss with respect to them, by kernels in place.

    Args:
        logits: [C, V]; must not be used any more.
        target: int64 [C].
        temperature: [C] or None.
        rows: what ``score_rows`` said of them; of it ``lse``, and ``entropy`` if ``grad_entropy`` is given.
        grad_logprobs: [C] gradient of the loss with respect to the log-probs.
        grad_entropy: the same for the entropies, or None.

    Returns:
        [C, V] in the dtype of the logits.
    """
    if _has_kernels(logits):
        from milepost_trainer import head_kernels

        return head_kernels.grad_(
            logits, target, temperature, rows.lse, rows.entropy, grad_logprobs, grad_entropy
        )
    scores = _scaled(logits, temperature) - rows.lse[:, None]
    probabilities = scores.exp()
    slope = probabilities * -grad_logprobs[:, None]
    if grad_entropy is not None:
        entropy = cast(torch.Tensor, rows.entropy)
        slope -= probabilities * (scores + entropy[:, None]) * grad_entropy[:, None]
    slope.scatter_add_(1, target[:, None], grad_logprobs[:, None])
    if temperature is not None:
        slope /= temperature[:, None]
    return slope.to(logits.dtype)


def _has_kernels(logits: torch.Tensor) -> bool:
    return logits.is_cuda and logits.dtype != torch.float64


def _scaled(logits: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
    exact = logits.float() if logits.dtype in _HALF else logits
    return exact if temperature is None else exact / temperature[:, None]
