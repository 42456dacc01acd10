"""What a sample of 4,096 tokens costs on the wire, counted in copies of its arrays by numpy.

    wire           sample -> bytes of its message, all sixteen fields, as the gateway packs it
                   -> message -> arrays, as the learner reads them
    wire_types     the same back to a whole `milepost.types.Sample`: the cost of the wire and of Python's
                   objects; told, not judged
    reference      numpy copies the sample's three arrays once

One process, one thread, allocator tuned as in every service. What comes back is compared with what went in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Row, Side, Size, ratio_row, take_turns
from benchmarks.samples import SAMPLE_BYTES, arrays, make_sample, same
from milepost import types as t
from milepost.convert import from_proto, pack_sample
from milepost.v1 import sample_pb2
from milepost_common.process import tune_malloc

TARGET = 6.0
TURNS = 20_000
_TOKENS, _MASK, _LOGPROBS = np.dtype("<i4"), np.dtype("|u1"), np.dtype("<f4")


async def measure(size: Size, folder: Path) -> list[Row]:
    """Rows `wire` and `wire_types`."""
    del folder
    tune_malloc()
    sample = make_sample(0, version=1)
    turns = size.of(TURNS, least=100)
    if not (
        same(_through_types(sample), sample) and all(map(np.array_equal, _through(sample), arrays(sample)))
    ):
        raise AssertionError("the wire gave back other arrays than it was given")
    more = {"sample_bytes": SAMPLE_BYTES, "turns_per_run": turns}
    rows: list[Row] = []
    for name, ours, target in (("wire", _through, TARGET), ("wire_types", _through_types, None)):
        runs = await take_turns(
            size.runs, ours=_side(ours, sample, turns), reference=_side(_copy, sample, turns)
        )
        rows.append(
            ratio_row(
                name,
                runs,
                unit="us of CPU per sample",
                target=target,
                compared="a numpy copy of the arrays",
                more=more,
            )
        )
    return rows


def _side(work: Callable[[t.Sample], Any], sample: t.Sample, turns: int) -> Side:
    async def run() -> float:
        started = time.process_time_ns()
        for _ in range(turns):
            work(sample)
        return (time.process_time_ns() - started) / turns / 1e3

    return run


def _through(sample: t.Sample) -> tuple[t.Int32Array, t.UInt8Array, t.Float32Array]:
    message = sample_pb2.Sample.FromString(pack_sample(sample))
    return (
        np.frombuffer(message.tokens, _TOKENS),
        np.frombuffer(message.loss_mask, _MASK),
        np.frombuffer(message.logprobs, _LOGPROBS),
    )


def _through_types(sample: t.Sample) -> t.Sample:
    return from_proto(t.Sample, sample_pb2.Sample.FromString(pack_sample(sample)))


def _copy(sample: t.Sample) -> object:
    return sample.tokens.copy(), sample.loss_mask.copy(), sample.logprobs.copy()
