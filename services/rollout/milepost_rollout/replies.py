"""What an engine answered to `/generate`: parsed once, checked field by field, turned into arrays.

SGLang's shape:

    {"output_ids": [int ...],
     "meta_info": {"finish_reason": {"type": "stop" | "length" | "abort", ...},
                   "output_token_logprobs": [[logprob, token_id, text | null] ...],
                   "weight_version": "run/version/label",
                   "weight_versions": [{"version": str, "start": int, "end": int} ...]}}     from 0.5.19 on

Everything that does not fit is a `RubbishReply` naming the field: tokens are trained on, so nothing is
guessed.

Without spans a reply is bracketed, by the router's record and by the string that the engine had at its end:
its tokens count as the oldest version's, but the last one as the newest's, so that a version which the ledger
never publishes (its trainer was replaced, ADR 20) cannot hide behind an older one. Tokens of which nobody can
say that are dropped, as if the engine had cut the reply short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, cast

import numpy as np
import orjson

from milepost.types import Float32Array, Int32Array, VersionSpan

FINISHES = ("stop", "length", "abort")
_UPDATING = "updating/"
"""Begins the string of weights that are being replaced, under which nothing is generated."""
_FIRST, _SECOND = itemgetter(0), itemgetter(1)


class RubbishReply(Exception):
    """An engine answered what cannot be understood; the message names the field."""


@dataclass(frozen=True, kw_only=True)
class RouterRecord:
    """What the router says in headers of a reply: the versions at its start and end, and who answered."""

    version_start: int = 0
    version_end: int = 0
    engine_id: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """One reply. `output_ids` int32 and `logprobs` float32 (nats) are as long; spans count from 0."""

    output_ids: Int32Array
    logprobs: Float32Array
    spans: tuple[VersionSpan, ...]
    exact: bool
    finish: str
    matched: str | int | None = None
    message: str = ""
    engine_id: str = ""


def parse_reply(body: bytes, *, run_id: str, record: RouterRecord) -> Generation:
    """Reads a reply's JSON.

    Args:
      body: the reply.
      run_id: whose weights are expected; empty takes any.
      record: the router's word, for engines that report no spans.

    Raises:
      RubbishReply: names the field, what it is and what was wanted.
    """
    try:
        reply = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RubbishReply(f"the reply is not JSON ({error}): {body[:80]!r}") from None
    meta = _field(_object(reply, "the reply"), "meta_info", dict)
    ids = _output_ids(reply)
    finish, logprobs = _finish(meta), _logprobs(meta, ids)
    spans = _spans(meta, num_tokens=len(ids), run_id=run_id, record=record)
    if spans is None:
        ids, logprobs, spans = ids[:0], logprobs[:0], ()
        finish = {"type": "abort", "message": "nobody says which weights wrote the end of the reply"}
    return Generation(
        output_ids=ids,
        logprobs=logprobs,
        spans=spans,
        exact="weight_versions" in meta,
        finish=finish["type"],
        matched=finish.get("matched"),
        message=str(finish.get("message") or ""),
        engine_id=record.engine_id,
    )


def read_version(text: Any, *, run_id: str, field: str) -> int:
    """Reads a version string `<run>/<version>/<label>`; 0 for weights that no ledger names.

    Raises:
      RubbishReply: it names another run, or is no version string where a run is expected.
    """
    parts = str(text).rsplit("/", 2)
    named = len(parts) == 3 and not str(text).startswith(_UPDATING)
    if named and parts[1].isdecimal() and parts[2].isdecimal():
        if run_id and parts[0] != run_id:
            raise RubbishReply(f"{field} is {text!r}, of another run than {run_id!r}")
        return int(parts[1])
    if run_id:
        raise RubbishReply(f"{field} is {text!r}, wanted {run_id}/<version>/<label>")
    return 0


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RubbishReply(f"{name} is {type(value).__name__}, wanted an object")
    return cast(dict[str, Any], value)


def _field(parent: dict[str, Any], name: str, kind: type, inside: str = "") -> Any:
    value = parent.get(name)
    if not isinstance(value, kind):
        raise RubbishReply(f"{inside}{name} is {_shown(value)}, wanted {kind.__name__}")
    return value


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _output_ids(reply: dict[str, Any]) -> Int32Array:
    ids = _field(reply, "output_ids", list)
    try:
        array = np.array(ids, dtype=np.int64) if ids else np.empty(0, np.int64)
    except (ValueError, TypeError, OverflowError):
        raise RubbishReply(f"output_ids is {_shown(ids)}, wanted token ids") from None
    if array.ndim != 1 or (len(array) and not 0 <= array.min() <= array.max() < 2**31):
        raise RubbishReply(f"output_ids is {_shown(ids)}, wanted a flat list of ids from 0 to 2147483647")
    if set(map(type, ids)) - {int}:
        raise RubbishReply(f"output_ids is {_shown(ids)}, wanted whole numbers")
    return array.astype(np.int32)


def _finish(meta: dict[str, Any]) -> dict[str, Any]:
    finish = meta.get("finish_reason")
    if isinstance(finish, dict) and cast(dict[str, Any], finish).get("type") in FINISHES:
        return cast(dict[str, Any], finish)
    if finish is None:  # a chunk of a stream that was cut off
        return {"type": "abort", "message": "the reply ended early"}
    raise RubbishReply(f"meta_info.finish_reason is {_shown(finish)}, wanted a type of {', '.join(FINISHES)}")


def _logprobs(meta: dict[str, Any], ids: Int32Array) -> Float32Array:
    name = "meta_info.output_token_logprobs"
    entries: Sequence[Any] = meta.get("output_token_logprobs") or ()
    if len(entries) != len(ids):
        raise RubbishReply(f"{name} has {len(entries)} entries for {len(ids)} output_ids")
    try:
        values = np.fromiter(map(_FIRST, entries), np.float32, len(entries))
        tokens = np.fromiter(map(_SECOND, entries), np.int64, len(entries))
    except (TypeError, ValueError, IndexError, KeyError, OverflowError):
        raise RubbishReply(f"{name} is {_shown(entries)}, wanted [logprob, token_id, text] entries") from None
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise RubbishReply(f"{name}[{at}] is {values[at]}, wanted a finite number")
    if not np.array_equal(tokens, ids):
        at = int(np.flatnonzero(tokens != ids)[0])
        raise RubbishReply(f"{name}[{at}] is of token {tokens[at]}, but output_ids[{at}] is {ids[at]}")
    return values


def _spans(
    meta: dict[str, Any], *, num_tokens: int, run_id: str, record: RouterRecord
) -> tuple[VersionSpan, ...] | None:
    """Which version wrote which token; None where nobody can say it."""
    if not num_tokens:
        return ()
    if "weight_versions" in meta:
        return _reported_spans(_field(meta, "weight_versions", list, "meta_info."), num_tokens, run_id)
    start = record.version_start or _single_version(meta, run_id)
    end = max(record.version_end, _version_at_end(meta, run_id))
    if not run_id or end == start:
        return (VersionSpan(start=0, end=num_tokens, weight_version=start),)
    if not end or num_tokens == 1:
        return None
    return (
        VersionSpan(start=0, end=num_tokens - 1, weight_version=start),
        VersionSpan(start=num_tokens - 1, end=num_tokens, weight_version=end),
    )


def _version_at_end(meta: dict[str, Any], run_id: str) -> int:
    """The version that the engine had when it ended the reply; 0 where it does not say."""
    text = meta.get("weight_version")
    if not isinstance(text, str) or text.startswith(_UPDATING):
        return 0
    return read_version(text, run_id=run_id, field="meta_info.weight_version")


def _single_version(meta: dict[str, Any], run_id: str) -> int:
    text = meta.get("weight_version")
    return (
        read_version(text, run_id=run_id, field="meta_info.weight_version")
        if text is not None or run_id
        else 0
    )


def _reported_spans(reported: list[Any], num_tokens: int, run_id: str) -> tuple[VersionSpan, ...]:
    spans: list[VersionSpan] = []
    end = 0
    for i, entry in enumerate(reported):
        field = f"meta_info.weight_versions[{i}]"
        span = _object(entry, field)
        start, stop = span.get("start"), span.get("end")
        if start != end or not isinstance(stop, int) or stop < end:
            raise RubbishReply(f"{field} is {_shown(span)}, wanted a span that starts at {end}")
        if stop > end:
            version = read_version(span.get("version"), run_id=run_id, field=f"{field}.version")
            spans.append(VersionSpan(start=end, end=stop, weight_version=version))
        end = stop
    if end != num_tokens:
        raise RubbishReply(f"meta_info.weight_versions covers {end} of {num_tokens} tokens")
    return tuple(spans)
