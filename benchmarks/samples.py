"""The sample that is measured: 4,096 tokens, 36 KiB of arrays, as a gateway would seal it."""

from __future__ import annotations

import numpy as np

from milepost import types as t

TOKENS = 4096
SAMPLE_BYTES = TOKENS * (4 + 1 + 4)
_PROMPT_TOKENS = 256


def make_sample(index: int, *, version: int) -> t.Sample:
    """One sample; samples of different index hold different arrays."""
    random = np.random.default_rng(index)
    mask = np.ones(TOKENS, np.uint8)
    mask[:_PROMPT_TOKENS] = 0
    return t.Sample(
        tokens=random.integers(0, 150_000, TOKENS).astype(np.int32),
        loss_mask=mask,
        logprobs=(-random.random(TOKENS)).astype(np.float32),
        prompt_length=_PROMPT_TOKENS,
        version_spans=(t.VersionSpan(start=_PROMPT_TOKENS, end=TOKENS, weight_version=version),),
        version_spans_exact=True,
        reward=1.0,
        outcome=t.Outcome.COMPLETED,
        engine_id="engine-0",
    )


def arrays(sample: t.Sample) -> tuple[t.Int32Array, t.UInt8Array, t.Float32Array]:
    """What is trained on."""
    return sample.tokens, sample.loss_mask, sample.logprobs


def same(a: t.Sample, b: t.Sample) -> bool:
    """The arrays are equal, byte for byte."""
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(arrays(a), arrays(b), strict=True))
