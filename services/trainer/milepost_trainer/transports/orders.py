"""What a trainer tells the hook in an engine's process: where its weights lie, and later only "again".

    Layout.of(manifest, weights)   where every tensor lies now; another one as soon as any of them moved
    layout.order(transaction)      JSON; `whole`: with the place of every tensor, for one who does not know it

Each tensor is a segment of its own, named by its place in the manifest: torch shares memory by tensor, and
opens what lies in one allocation once. The reader is `milepost_engine.weight_hook`.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from milepost.types import TensorSpec
from milepost_trainer.buckets import Bucket, dtype_name

STAMP = "stamp"
"""Segment with the number of the order that was given last."""

_numbers = itertools.count(1)


def encode(text: str, segments: Sequence[tuple[str, Any]] = ()) -> bytes:
    """An order as SGLang hands it on: named tensors, the first of them named by the text."""
    return base64.b64encode(pickle.dumps([(text, _Nothing()), *segments]))


class _Nothing:
    """Pickles as an empty tensor: SGLang wants one beside every name."""

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.Tensor, ()


@dataclass(frozen=True)
class Layout:
    """Where the weights lie.

    Attributes:
        name: unlike any other layout's, of this trainer or another.
        weights: as they were handed over; the very same again lie where they lay.
        tensors: in the manifest's order.
        places: what the hook is told of each.
        print: changes when any tensor moves or is another one.
    """

    name: str
    weights: Mapping[str, torch.Tensor]
    tensors: tuple[torch.Tensor, ...]
    places: tuple[tuple[Any, ...], ...]
    print: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        owner: str,
        manifest: Sequence[TensorSpec],
        weights: Mapping[str, torch.Tensor],
        held: Layout | None,
    ) -> Layout:
        """The layout of weights; `held` again where nothing has moved.

        Args:
            owner: this trainer, as no other one is named.
            manifest: names, and the dtypes that engines shall see.
            weights: by name.
            held: the layout before.
        """
        if held is not None and held.weights is weights:
            return held
        tensors = tuple(weights[spec.name] for spec in manifest)
        marks = tuple(
            (spec.name, spec.dtype, x.data_ptr(), x.dtype, x.shape)
            for spec, x in zip(manifest, tensors, strict=True)
        )
        if held is not None and held.print == marks:
            return held
        places = tuple(
            (spec.name, list(x.shape), dtype_name(x.dtype), spec.dtype, str(index), 0)
            for index, (spec, x) in enumerate(zip(manifest, tensors, strict=True))
        )
        return cls(f"{owner}/{next(_numbers)}", weights, tensors, places, marks)

    @property
    def segments(self) -> tuple[tuple[str, torch.Tensor], ...]:
        """The tensors by the names that places give them."""
        return tuple((str(index), tensor) for index, tensor in enumerate(self.tensors))

    def order(self, transaction_id: str, *, whole: bool, stamp: int = 0) -> str:
        """The text of an order; `stamp`: what its reader is to find in the segment of that name."""
        said: dict[str, Any] = {"transaction": transaction_id, "layout": self.name, "stamp": stamp}
        return json.dumps({**said, "places": self.places} if whole else said)


def pushed(
    transaction_id: str, buckets: Sequence[Bucket], *, group: str, timeout_s: float, depth: int
) -> str:
    """The text of an order whose tensors are broadcast.

    Args:
        transaction_id: whose order it is.
        buckets: in sending order.
        group: the process group.
        timeout_s: how long the receiver waits.
        depth: how many buckets it is to have room for; 0: it knows all this.
    """
    told = [
        [b.size_bytes, [[s.name, list(s.shape), s.dtype, s.offset_bytes] for s in b.slots]] for b in buckets
    ]
    said: dict[str, Any] = {"group": group, "timeout_s": timeout_s}
    if depth:
        said |= {"depth": depth, "buckets": told}
    layout = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    return json.dumps({"transaction": transaction_id, "layout": layout, "pushed": said})
