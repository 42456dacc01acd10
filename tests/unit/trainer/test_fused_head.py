"""The fused LM head: scores and gradients are those of a plain log-softmax, and no [M, V] ever exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from milepost_trainer.head import RowScores, TokenScores, score_tokens

M, H, V = 37, 8, 51


def _inputs(dtype: torch.dtype, *, bias: bool = True) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(M, H, dtype=dtype, requires_grad=True),
        "weight": torch.randn(V, H, dtype=dtype, requires_grad=True),
        "bias": torch.randn(V, dtype=dtype, requires_grad=True) if bias else None,
        "target": torch.randint(0, V, (M,)),
        "temperature": torch.rand(M, dtype=torch.float64) + 0.5,
    }


def _plain(inputs: dict[str, Any]) -> TokenScores:
    """Log-softmax of all logits at once, by autograd."""
    logits = torch.nn.functional.linear(inputs["hidden"], inputs["weight"], inputs["bias"])
    scores = torch.log_softmax(logits / inputs["temperature"][:, None], -1)
    picked = scores.gather(-1, inputs["target"][:, None])[:, 0]
    return TokenScores(picked, -(scores.exp() * scores).sum(-1))


def _loss(scores: TokenScores) -> torch.Tensor:
    assert scores.entropy is not None
    return (scores.logprobs.square().sum() + 0.3 * scores.entropy.pow(3).sum()) / M


@pytest.mark.parametrize("chunk", [1, 5, M - 1, M, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_scores_and_gradients_are_those_of_a_plain_log_softmax(chunk: int, bias: bool) -> None:
    inputs = _inputs(torch.float64, bias=bias)
    leaves = [inputs[name] for name in ("hidden", "weight", "bias") if inputs[name] is not None]
    plain = _plain(inputs)
    fused = score_tokens(**inputs, chunk_tokens=chunk, with_entropy=True)
    torch.testing.assert_close(fused.logprobs, plain.logprobs, rtol=0, atol=1e-12)
    torch.testing.assert_close(fused.entropy, plain.entropy, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(_loss(plain), leaves)
    for ours, theirs in zip(torch.autograd.grad(_loss(fused), leaves), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_gradient_is_the_slope_of_the_scores() -> None:
    """By finite differences, independently of any formula for the gradient."""
    inputs = _inputs(torch.float64)
    leaves = (inputs["hidden"], inputs["weight"], inputs["bias"])

    def loss(*values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(("hidden", "weight", "bias"), values, strict=True))
        return _loss(score_tokens(**(inputs | named), chunk_tokens=11, with_entropy=True))

    assert torch.autograd.gradcheck(loss, leaves, atol=1e-6)


@pytest.mark.parametrize("chunk", [7, 64])
def test_half_precision_adds_up_in_float32(chunk: int) -> None:
    """bfloat16 logits, like the plain path's; sums over tokens lose nothing more than one rounding."""
    inputs = _inputs(torch.bfloat16, bias=False)
    inputs["temperature"] = inputs["temperature"].float()
    fused = score_tokens(**inputs, chunk_tokens=chunk, with_entropy=True)
    assert fused.logprobs.dtype == torch.float32
    ours = torch.autograd.grad(fused.logprobs.sum(), (inputs["hidden"], inputs["weight"]))
    exact = {n: v.detach().double().requires_grad_() for n, v in inputs.items() if n in ("hidden", "weight")}
    plain = _plain(inputs | exact)
    torch.testing.assert_close(fused.logprobs.double(), plain.logprobs, rtol=0, atol=0.06)
    theirs = torch.autograd.grad(plain.logprobs.sum(), (exact["hidden"], exact["weight"]))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.bfloat16
        error = (mine.double() - wanted).norm() / wanted.norm()
        assert error < 0.01


def test_unused_outputs_and_frozen_inputs_get_no_gradient() -> None:
    inputs = _inputs(torch.float64)
    inputs["weight"] = inputs["weight"].detach()
    scores = score_tokens(**inputs, chunk_tokens=5, with_entropy=True)
    assert scores.entropy is not None
    alone = torch.autograd.grad(scores.entropy.sum(), inputs["hidden"], retain_graph=True)[0]
    wanted = _plain(inputs).entropy
    assert wanted is not None
    plain = torch.autograd.grad(wanted.sum(), inputs["hidden"])[0]
    torch.testing.assert_close(alone, plain, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert not score_tokens(**inputs).logprobs.requires_grad


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation yields."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def test_all_logits_never_exist_at_once() -> None:
    inputs = _inputs(torch.float64, bias=False)
    with _Largest() as seen:
        scores = score_tokens(**inputs, chunk_tokens=6, with_entropy=True)
        _loss(scores).backward()
    assert seen.numel == max(6 * V, V * H, M * H)
    with _Largest() as seen:
        _loss(_plain(inputs)).backward()
    assert seen.numel == M * V, "the plain path does hold them: the measure works"


@pytest.mark.parametrize("chunk", [5, M, 1000])
def test_gradients_made_in_the_forward_pass_are_the_same(chunk: int) -> None:
    inputs = _inputs(torch.float64)
    leaves = [inputs[name] for name in ("hidden", "weight", "bias")]
    cuts: list[slice] = []

    def slope(cut: slice, rows: RowScores) -> torch.Tensor:
        cuts.append(cut)
        return 2 * rows.logprobs / M

    plain = _plain(inputs)
    fused = score_tokens(**inputs, chunk_tokens=chunk, with_entropy=True, slope=slope)
    assert sum(cut.stop - cut.start for cut in cuts) == M
    torch.testing.assert_close(fused.entropy, plain.entropy, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(plain.logprobs.square().sum() / M, leaves)
    for ours, theirs in zip(
        torch.autograd.grad(fused.logprobs.square().sum() / M, leaves), wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_slope_goes_with_no_loss_of_entropies() -> None:
    inputs = _inputs(torch.float64)
    scores = score_tokens(
        **inputs, chunk_tokens=5, with_entropy=True, slope=lambda _, rows: torch.ones_like(rows.logprobs)
    )
    with pytest.raises(RuntimeError, match="leave slope out"):
        _loss(scores).backward()
