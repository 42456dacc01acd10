"""Keeps prefixes that an engine caches under different weights apart.

SGLang finds KV of a prompt's beginning by its tokens and by the request's `extra_key`. An update flushes that
cache only where SGLang can under load (0.5.21, `retract`); anywhere else KV of older weights stays in it. So
requests to an engine with such a cache say for which weights they are:

    {"input_ids": ...}                    {"extra_key": "run/7/6", "input_ids": ...}
    {..., "extra_key": "tenant"}          {..., "extra_key": "tenant|run/7/6"}

KV of older weights is found by nobody then, and falls out of the cache in time. A request that an update
holds keeps the key that it came with: with `retract`, SGLang before 0.5.21 computes it again from what it
finds there.
"""

from __future__ import annotations

from typing import Any, cast

import orjson

from milepost_router.record import EngineRecord
from milepost_router.targets import takes_key
from milepost_router.version_string import LoadedVersion

_NAME = "extra_key"
_QUOTED = b'"extra_key"'


def body_for(record: EngineRecord, target: bytes, body: bytes) -> bytes:
    """The body of a request as this engine is to have it.

    Args:
      record: the engine.
      target: path and query.
      body: as the client sent it; what is no JSON object stays as it is, for the engine to refuse.
    """
    if not (record.version and record.keys_prefixes and takes_key(target)):
        return body
    return _keyed(body, str(LoadedVersion(record.run_id, record.version, record.label)))


def _keyed(body: bytes, key: str) -> bytes:
    if _QUOTED not in body:
        rest = body.lstrip()
        if not rest.startswith(b"{"):
            return body
        rest = rest[1:]
        comma = b"" if rest.lstrip().startswith(b"}") else b","
        return b"{%s:%s%s%s" % (_QUOTED, orjson.dumps(key), comma, rest)
    try:
        said: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    if not isinstance(said, dict):
        return body
    fields = cast(dict[str, Any], said)
    return orjson.dumps(fields | {_NAME: _joined(fields.get(_NAME), key)})


def _joined(own: object, key: str) -> object:
    """A client's key, or its keys, one a prompt, with ours; what is neither stays as it is."""
    if own is None or own == "":
        return key
    if isinstance(own, str):
        return f"{own}|{key}"
    if isinstance(own, list):
        return [_joined(each, key) for each in cast(list[object], own)]
    return own
