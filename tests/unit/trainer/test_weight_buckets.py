"""Bucket plans: each tensor once, back to back, in order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milepost_trainer.buckets import plan_buckets, read_bucket

_SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=20)
_DTYPES = st.sampled_from(["float32", "bfloat16", "uint8"])


@given(st.data(), _SHAPES, st.integers(1, 2000))
def test_layout(data: st.DataObject, shapes: list[tuple[int, ...]], budget: int) -> None:
    tensors = [(f"t{i}", data.draw(_DTYPES), shape) for i, shape in enumerate(shapes)]
    buckets = plan_buckets(tensors, bucket_bytes=budget)
    flat = [(slot.name, slot.dtype, slot.shape) for bucket in buckets for slot in bucket.slots]
    assert flat == tensors
    assert [bucket.index for bucket in buckets] == list(range(len(buckets)))
    for bucket in buckets:
        expected = 0
        for slot in bucket.slots:
            assert slot.offset_bytes == expected
            expected += slot.size_bytes
        assert bucket.size_bytes == expected
        assert bucket.size_bytes <= budget or len(bucket.slots) == 1


def test_reading_a_bucket_back_also_where_offsets_are_odd() -> None:
    (bucket,) = plan_buckets([("a", "uint8", (3,)), ("b", "float32", (2, 2))], bucket_bytes=100)
    b = torch.arange(4, dtype=torch.float32).reshape(2, 2)
    flat = torch.cat([torch.tensor([1, 2, 3], dtype=torch.uint8), b.reshape(-1).view(torch.uint8)])
    named = read_bucket(bucket, flat)
    assert named["a"].tolist() == [1, 2, 3]
    assert torch.equal(named["b"], b)


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="stand twice: a"):
        plan_buckets([("a", "uint8", (1,)), ("a", "uint8", (1,))], bucket_bytes=1)
    with pytest.raises(ValueError, match="bucket_bytes is 0"):
        plan_buckets([("a", "uint8", (1,))], bucket_bytes=0)
