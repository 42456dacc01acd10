"""Tensors that go to the host and come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from milepost_trainer.backends.fsdp import FsdpBackend
from milepost_trainer.backends.offload import Shelf
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.world import World


def held(*tensors: torch.Tensor) -> int:
    """Bytes that the tensors' storages take."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_whoever_holds_a_tensor_finds_its_data_again() -> None:
    whole = torch.arange(24, dtype=torch.float32)
    view, other = whole.view(4, 6)[1:3], torch.ones(5, dtype=torch.bfloat16)
    expected = whole.clone(), view.clone(), other.clone()
    shelf = Shelf(lambda: [view, whole, other], enabled=True)
    for _ in range(3):
        shelf.put_away()
        shelf.put_away()
        assert shelf.is_away
        assert held(whole, other) == 0
        shelf.fetch()
        shelf.fetch()
        assert not shelf.is_away
        assert all(torch.equal(a, b) for a, b in zip((whole, view, other), expected, strict=True))
        whole.add_(1)
        expected = expected[0] + 1, expected[1] + 1, expected[2]
    assert shelf.seconds > 0


def test_a_fetch_that_runs_out_of_memory_is_taken_up_where_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.full((3,), float(i)) for i in range(4)]
    shelf = Shelf(lambda: tensors, enabled=True)
    shelf.put_away()
    resize, calls = torch.UntypedStorage.resize_, []

    def short_once(storage: torch.UntypedStorage, size: int) -> object:
        calls.append(size)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("none left")
        return resize(storage, size)

    monkeypatch.setattr(torch.UntypedStorage, "resize_", short_once)
    with pytest.raises(torch.OutOfMemoryError):
        shelf.fetch()
    assert shelf.is_away
    shelf.fetch()
    assert [t.tolist() for t in tensors] == [[float(i)] * 3 for i in range(4)]


def test_a_shelf_that_is_not_wanted_leaves_everything_where_it_is() -> None:
    tensor = torch.ones(4)
    shelf = Shelf(lambda: [tensor], enabled=False)
    shelf.put_away()
    assert not shelf.is_away
    assert held(tensor) == 16


@pytest.mark.parametrize("mode, moments, weights", [("none", 1, 1), ("optimizer", 0, 1), ("all", 0, 0)])
def test_what_the_backend_keeps_at_rest(model_dir: Path, mode: str, moments: int, weights: int) -> None:
    settings = TrainerSettings.model_validate(
        {"model_dir": str(model_dir), "initial_weights": "random", "offload": mode}
    )
    backend = FsdpBackend(settings, World())
    backend.rest()
    optimizer = backend._optimizer  # pyright: ignore[reportPrivateUsage]
    parameters = backend._parameters  # pyright: ignore[reportPrivateUsage]
    assert (held(*(state["exp_avg"] for state in optimizer.state.values())) > 0) == bool(moments)
    assert (held(*parameters) > 0) == bool(weights)
    buckets = backend.plan_buckets(bucket_bytes=1 << 30, wire_dtype=None)
    assert all(backend.gather_bucket(bucket) is not None for bucket in buckets)
    assert held(*parameters) > 0


def test_weights_that_engines_keep_open_do_not_move() -> None:
    with pytest.raises(ValidationError, match="engines keep the trainer's weights open"):
        TrainerSettings.model_validate(
            {"model_dir": "m", "offload": "all", "publish": {"transport": "cuda_ipc"}}
        )
