"""Weights read out for publication: buckets, and all of them where they lie."""

from __future__ import annotations

import torch

from milepost.types import TensorSpec
from milepost_trainer.backends.gathering import Gathering
from milepost_trainer.buckets import plan_buckets, read_bucket
from milepost_trainer.transports.orders import Layout
from milepost_trainer.world import World


def made() -> dict[str, torch.Tensor]:
    """Tensors of odd sizes, one of them no view of its storage's beginning."""
    torch.manual_seed(0)
    whole = torch.randn(7, 5)
    return {"a": torch.randn(3, 3), "b": whole[2:4], "c": torch.arange(5), "d": torch.randn(1)}


def buckets_of(named: dict[str, torch.Tensor], *, dtype: str = "bfloat16", bucket_bytes: int = 1 << 20):
    layout = [
        (name, dtype if x.is_floating_point() else "int64", tuple(x.shape)) for name, x in named.items()
    ]
    return plan_buckets(layout, bucket_bytes=bucket_bytes)


def manifest_of(named: dict[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=n, dtype="bfloat16", shape=tuple(x.shape)) for n, x in named.items())


def test_a_bucket_holds_every_tensor_cast_also_where_it_is_not_aligned():
    """Nine bfloat16 before int64 leave these across their own size."""
    named = made()
    (bucket,) = buckets_of(named)
    flat = Gathering(named, World(), resident=False).bucket(bucket)
    assert flat is not None
    for name, found in read_bucket(bucket, flat).items():
        assert torch.equal(found, named[name].to(found.dtype)), name


def test_resident_buckets_are_written_again_where_they_are():
    named = made()
    gathering = Gathering(named, World(), resident=True)
    first, second = buckets_of(named, bucket_bytes=40)[:2]
    before = gathering.bucket(first)
    other = gathering.bucket(second)
    assert before is not None
    assert other is not None
    named["a"].add_(1)
    after = gathering.bucket(first)
    assert after is before
    assert other.data_ptr() != before.data_ptr()
    assert torch.equal(read_bucket(first, before)["a"], named["a"].bfloat16())
    assert Gathering(named, World(), resident=False).bucket(first) is not before


def test_what_lies_whole_on_one_rank_is_not_copied():
    named = made()
    gathering = Gathering(named, World(), resident=True)
    found = gathering.whole(())
    assert {name: x.data_ptr() for name, x in found.items()} == {n: x.data_ptr() for n, x in named.items()}
    assert gathering.whole(()) is found


def test_a_tensor_that_moved_is_found_where_it_is_now():
    named = {"a": torch.nn.Parameter(torch.randn(3)), "b": torch.nn.Parameter(torch.randn(3))}
    gathering = Gathering(named, World(), resident=True)
    before = gathering.whole(())
    held = Layout.of("me", manifest_of(named), before, None)
    assert Layout.of("me", manifest_of(named), gathering.whole(()), held) is held
    named["a"].data = torch.randn(3)
    after = gathering.whole(())
    assert after["a"].data_ptr() == named["a"].data_ptr()
    moved = Layout.of("me", manifest_of(named), after, held)
    assert moved.name != held.name
    assert not after["a"].requires_grad


def test_a_tensor_that_is_not_contiguous_is_copied_each_time_anew():
    named = {"a": torch.randn(4, 4).t()}
    gathering = Gathering(named, World(), resident=True)
    first = gathering.whole(())["a"].clone()
    assert torch.equal(first, named["a"])
    named["a"].add_(1)
    assert torch.equal(gathering.whole(())["a"], named["a"])
