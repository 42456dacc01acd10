"""The hook's plan on a GPU: one kernel for all that needs no cast, and what it leaves to torch."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch import nn

from milepost_engine import weight_hook

pytestmark = pytest.mark.gpu(1)


class Model(nn.Module):
    """Whole tensors, slices of columns, casts, and what begins in the middle of a word."""

    def __init__(self) -> None:
        super().__init__()

        def made(*shape: int) -> nn.Parameter:
            given: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
            return nn.Parameter(torch.full(shape, 7.0, **given), requires_grad=False)

        self.whole = made(3000, 512)
        self.pair = made(64, 300)
        self.columns = made(130, 256)
        self.cast = made(100, 50)
        self.odd = made(33)

    def load_weights(self, weights: Any) -> None:
        for name, loaded in weights:
            if name in ("first", "second"):
                self.pair[32 * (name == "second") :][:32].data.copy_(loaded)
            elif name == "columns":
                self.columns.data.copy_(loaded[:, 256:])
            else:
                self.get_parameter(name).data.copy_(loaded)


def sources() -> dict[str, torch.Tensor]:
    given: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    return {
        "whole": torch.zeros(3000, 512, **given),
        "first": torch.zeros(32, 300, **given),
        "second": torch.zeros(32, 300, **given),
        "columns": torch.zeros(130, 512, **given),
        "cast": torch.zeros(100, 50, device="cuda"),
        "odd": torch.zeros(34, **given)[1:],
    }


def trained(held: dict[str, torch.Tensor], seed: int) -> Model:
    """Other weights in the same places; what a model of them is."""
    torch.manual_seed(seed)
    for tensor in held.values():
        tensor.copy_(torch.randn(tensor.shape))
    wanted = Model()
    wanted.load_weights(held.items())
    return wanted


def same(one: nn.Module, other: nn.Module) -> bool:
    others = dict(other.named_parameters())
    return all(torch.equal(weight, others[name]) for name, weight in one.named_parameters())


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "no Triton"])
def test_a_signal_does_what_the_models_own_loader_did(kernel: bool, monkeypatch: pytest.MonkeyPatch):
    if not kernel:
        monkeypatch.setitem(sys.modules, "milepost_engine.copy_kernel", None)
        monkeypatch.delattr("milepost_engine.copy_kernel", raising=False)
    held, model = sources(), Model()
    wanted = trained(held, 1)
    named = [(name, x.dtype) for name, x in held.items()]
    places = [
        (name, list(held[name].shape), str(dtype).removeprefix("torch."), "bfloat16", name, 0)
        for name, dtype in named
    ]
    nothing = torch.empty(0)
    told = {"transaction": "t1", "layout": "a", "places": places}
    weight_hook.load(model, [(json.dumps(told), nothing), *held.items()])
    state = weight_hook._states[model]
    assert state.report["ok"], state.report
    assert same(model, wanted)
    plan = state.plan
    assert plan is not None
    assert plan.refused == ""
    left = len(plan.large) + sum(len(targets) for targets, _ in plan.small)
    if kernel:
        assert plan.table is not None
        assert left == 2, "the cast, and what begins in the middle of a word"
    else:
        assert plan.table is None
        assert left == 6
    for seed in (2, 3):
        wanted = trained(held, seed)
        weight_hook.load(model, [(json.dumps({"transaction": f"t{seed}", "layout": "a"}), nothing)])
        assert (state.report["ok"], state.report["planned"]) == (True, True), state.report
        assert same(model, wanted)
