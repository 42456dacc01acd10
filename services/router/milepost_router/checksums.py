"""What engines' checksums of their weights say: one string each, and who is at odds with the others."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, cast

import orjson


class _Named(Protocol):
    @property
    def engine_id(self) -> str: ...


M = TypeVar("M", bound=_Named)


def checksum_of(answer: dict[str, Any]) -> str:
    """One checksum from what the weight checker says: its ranks' sums, or the digest of it all."""
    ranks: object = answer.get("ranks")
    if isinstance(ranks, list):
        each = [cast(dict[str, Any], rank) for rank in cast(list[object], ranks) if isinstance(rank, dict)]
        sums = [str(rank.get("per_gpu_checksum", "")) for rank in each]
        if sums and all(sums):
            return ",".join(sums)
    telling = {key: value for key, value in answer.items() if key not in ("success", "message")}
    raw = orjson.dumps(telling, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(raw).hexdigest() if telling else ""


def odd_ones(sums: Mapping[M, tuple[str, str]]) -> dict[M, str]:
    """Members whose checksum differs from most of their layout's; without a majority, all of them."""
    odd: dict[M, str] = {}
    for layout in {layout for layout, _ in sums.values()}:
        of_layout = {m: s for m, (its, s) in sums.items() if its == layout}
        common, count = Counter(of_layout.values()).most_common(1)[0]
        majority = 2 * count > len(of_layout)
        for member, checksum in of_layout.items():
            if len(set(of_layout.values())) > 1 and not (majority and checksum == common):
                odd[member] = f"{member.engine_id}: checksum {checksum[:16]} differs from others of {layout}"
    return odd
