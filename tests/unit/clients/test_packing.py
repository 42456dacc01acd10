"""Payloads are put together by hand: protobuf must read in them what it would have written itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost import convert
from milepost import types as t
from milepost.v1 import sample_pb2

_LENGTHS = st.one_of(
    st.integers(0, 40), st.sampled_from([31, 32, 127, 128, 129, 4095, 4096, 16383, 16384, 600_000])
)
_TEXTS = st.text(max_size=200)


def _sample(
    num_tokens: int,
    *,
    index: int = 0,
    text: str = "",
    reward: float = 0.0,
    spans: tuple[t.VersionSpan, ...] = (),
) -> t.Sample:
    random = np.random.default_rng(num_tokens + index)
    return t.Sample(
        index=index,
        tokens=random.integers(0, 150_000, num_tokens).astype(np.int32),
        loss_mask=random.integers(0, 2, num_tokens).astype(np.uint8),
        logprobs=-random.random(num_tokens).astype(np.float32),
        reward=reward,
        reward_parts={"length": reward} if text else {},
        text=text,
        metadata_json=text,
        version_spans=spans,
        outcome=t.Outcome.COMPLETED,
    )


@given(num_tokens=_LENGTHS, index=st.integers(0, 300), text=_TEXTS, reward=st.floats(allow_nan=False))
def test_a_sample_reads_as_its_message(num_tokens: int, index: int, text: str, reward: float) -> None:
    spans = (t.VersionSpan(start=0, end=num_tokens, weight_version=index + 1),) if index else ()
    sample = _sample(num_tokens, index=index, text=text, reward=reward, spans=spans)
    packed = convert.pack_sample(sample)
    assert sample_pb2.Sample.FromString(packed) == convert.to_proto(sample)
    assert len(packed) == len(convert.to_proto(sample).SerializeToString()) or num_tokens == 0


@given(st.lists(_LENGTHS, max_size=5), _TEXTS)
def test_a_payload_reads_as_its_message(lengths: list[int], text: str) -> None:
    prompt = t.Prompt(prompt_id="p", text=text, label=text)
    samples = [_sample(length, index=index) for index, length in enumerate(lengths)]
    message = sample_pb2.GroupPayload(prompt=convert.to_proto(prompt), samples=map(convert.to_proto, samples))
    assert sample_pb2.GroupPayload.FromString(convert.pack_payload(prompt, samples)) == message
    group = convert.make_group(prompt, attempt=1, samples=samples[::-1])
    assert sample_pb2.GroupPayload.FromString(group.payload) == message


@pytest.mark.parametrize("kind", ["other dtypes", "not contiguous", "big-endian"])
def test_arrays_are_brought_into_the_form_of_the_wire(kind: str) -> None:
    tokens = np.arange(2, 22, 2)
    if kind == "not contiguous":
        tokens = np.arange(2, 22, dtype=np.int32)[::2]
    elif kind == "big-endian":
        tokens = tokens.astype(">i4")
    sample = t.Sample(
        tokens=tokens, loss_mask=np.ones(10, bool), logprobs=np.linspace(-1, 0, 10), outcome=t.Outcome.ABORTED
    )
    back = convert.from_proto(t.Sample, sample_pb2.Sample.FromString(convert.pack_sample(sample)))
    assert back.tokens.tolist() == list(range(2, 22, 2))
    assert back.loss_mask.tolist() == [1] * 10
    np.testing.assert_array_equal(back.logprobs, np.linspace(-1, 0, 10).astype(np.float32))
