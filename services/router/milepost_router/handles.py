"""What the header of a bucket brings for one engine. Pure functions."""

from __future__ import annotations

from milepost.errors import InvalidArgument
from milepost.types import BucketHeader, HandlesOfEngine


def brought(header: BucketHeader, engine_id: str) -> HandlesOfEngine:
    """What is there for an engine, or else for all of them; without handles where nothing is."""
    own = [h for h in header.handles if h.engine_id == engine_id]
    common = [h for h in header.handles if not h.engine_id]
    return (own or common or [HandlesOfEngine()])[0]


def of_ranks(header: BucketHeader, engine_id: str, ranks: int) -> list[str]:
    """The handles for an engine, one a rank.

    Raises:
      InvalidArgument: there is none for it, or not one a rank.
    """
    chosen = brought(header, engine_id)
    if not chosen.handles:
        raise InvalidArgument(
            f"handles of bucket {header.bucket_index}: none for engine {engine_id}; send one with its "
            "engine_id, or one without engine_id for every member"
        )
    if len(chosen.handles) not in (1, ranks):
        raise InvalidArgument(
            f"handles of bucket {header.bucket_index} for engine {engine_id}: {len(chosen.handles)} "
            f"were sent for {ranks} ranks; send one a rank"
        )
    texts = [h.decode() for h in chosen.handles]
    return texts * ranks if len(texts) == 1 else texts
