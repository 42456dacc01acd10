"""Engines' replies: what fits becomes arrays, what does not is refused by the name of its field."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from milepost.types import VersionSpan
from milepost_rollout.replies import RouterRecord, RubbishReply, parse_reply

NO_RECORD = RouterRecord()


def good(**changes: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "finish_reason": {"type": "stop", "matched": 5},
        "output_token_logprobs": [[-0.25, 3, None], [-1.5, 5, "x"]],
        "weight_version": "r/8/4",
        "weight_versions": [
            {"version": "r/7/3", "start": 0, "end": 1},
            {"version": "r/8/4", "start": 1, "end": 2},
        ],
    }
    meta.update(changes.pop("meta", {}))
    return {"output_ids": [3, 5], "meta_info": meta, **changes}


def parse(reply: Any, *, run_id: str = "r", record: RouterRecord = NO_RECORD):
    body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    return parse_reply(body, run_id=run_id, record=record)


def test_arrays_spans_and_ending():
    generation = parse(good())
    assert generation.output_ids.dtype == np.int32
    assert generation.output_ids.tolist() == [3, 5]
    assert generation.logprobs.dtype == np.float32
    assert generation.logprobs.tolist() == [-0.25, -1.5]
    assert generation.spans == (
        VersionSpan(start=0, end=1, weight_version=7),
        VersionSpan(start=1, end=2, weight_version=8),
    )
    assert generation.exact
    assert (generation.finish, generation.matched) == ("stop", 5)


def bracketed(**changes: Any) -> dict[str, Any]:
    """A reply of an engine that reports no spans."""
    reply = good(**changes)
    del reply["meta_info"]["weight_versions"]
    return reply


@pytest.mark.parametrize(
    ("record", "string"),
    [
        (RouterRecord(version_start=6, version_end=8, engine_id="e0"), "r/8/4"),
        (RouterRecord(version_start=6, engine_id="e0"), "r/8/4"),
        (RouterRecord(version_start=6, version_end=8, engine_id="e0"), "updating/r/1/9/1"),
        (RouterRecord(version_start=6, version_end=8, engine_id="e0"), None),
    ],
    ids=["both say it", "a stream that broke", "the next update has begun", "an old engine"],
)
def test_without_spans_the_oldest_version_holds_and_the_newest_is_named(record: RouterRecord, string: Any):
    generation = parse(bracketed(meta={"weight_version": string}), record=record)
    assert generation.output_ids.tolist() == [3, 5]
    assert generation.spans == (
        VersionSpan(start=0, end=1, weight_version=6),
        VersionSpan(start=1, end=2, weight_version=8),
    )
    assert not generation.exact
    assert generation.engine_id == "e0"


def test_without_spans_a_reply_under_one_version_is_all_of_that():
    record = RouterRecord(version_start=8, version_end=8)
    assert parse(bracketed(), record=record).spans == (VersionSpan(start=0, end=2, weight_version=8),)


@pytest.mark.parametrize(
    ("reply", "record"),
    [
        (bracketed(meta={"weight_version": "updating/r/1/9/1"}), RouterRecord(version_start=6)),
        (
            bracketed(output_ids=[3], meta={"output_token_logprobs": [[-0.25, 3, None]]}),
            RouterRecord(version_start=6, version_end=8),
        ),
    ],
    ids=["an end that nobody names", "one token for two versions"],
)
def test_tokens_of_which_nobody_can_say_what_wrote_them_are_dropped(reply: Any, record: RouterRecord):
    generation = parse(reply, record=record)
    assert (generation.finish, len(generation.output_ids), len(generation.logprobs)) == ("abort", 0, 0)
    assert generation.spans == ()
    assert parse(reply, run_id="", record=record).spans[0].weight_version == 6, "no ledger asks there"


def test_without_spans_weights_of_another_run_are_refused():
    with pytest.raises(RubbishReply, match="of another run than 'r'"):
        parse(bracketed(meta={"weight_version": "s/8/4"}), record=RouterRecord(version_start=6))


def test_the_string_of_weights_that_are_being_replaced_names_no_version():
    reply = bracketed(meta={"weight_version": "updating/r/1/9/1"})
    assert parse(reply, run_id="").spans == (VersionSpan(start=0, end=2, weight_version=0),)
    with pytest.raises(RubbishReply, match="wanted r/<version>/<label>"):
        parse(reply)


def test_without_spans_and_record_the_single_version_holds():
    reply = good()
    del reply["meta_info"]["weight_versions"]
    assert parse(reply).spans == (VersionSpan(start=0, end=2, weight_version=8),)
    assert parse(reply, run_id="").spans[0].weight_version == 8


def test_weights_that_no_ledger_names_are_version_0():
    reply = good(meta={"weight_versions": [{"version": "default", "start": 0, "end": 2}]})
    assert parse(reply, run_id="").spans == (VersionSpan(start=0, end=2, weight_version=0),)
    with pytest.raises(RubbishReply, match="wanted r/<version>/<label>"):
        parse(reply)


def test_an_abort_without_tokens():
    meta = {
        "finish_reason": {"type": "abort", "message": "bye"},
        "output_token_logprobs": [],
        "weight_versions": [],
    }
    generation = parse(good(output_ids=[], meta=meta))
    assert (generation.finish, generation.message) == ("abort", "bye")
    assert generation.spans == ()
    assert len(generation.logprobs) == 0


@pytest.mark.parametrize(
    "reply, named",
    [
        (b"<html>", "not JSON"),
        (b"[]", "the reply is list"),
        ({"output_ids": [1]}, "meta_info is missing"),
        (good(output_ids=None), "output_ids is missing"),
        (good(output_ids="3"), "output_ids is '3'"),
        (good(output_ids=[3, "5"]), "output_ids"),
        (good(output_ids=[[3], [5]]), "output_ids"),
        (good(output_ids=[3, -1]), "output_ids"),
        (good(output_ids=[3, 2**40]), "output_ids"),
        (good(output_ids=[3, 2**80]), "output_ids"),
        (good(output_ids=[3.0, 5.0]), "output_ids"),
        (good(output_ids=[3, 5, 6]), "2 entries for 3 output_ids"),
        (good(output_ids=[3, 6]), r"output_token_logprobs\[1\] is of token 5, but output_ids\[1\] is 6"),
        (good(meta={"output_token_logprobs": [[-1, 3, None], [None, 5, None]]}), "output_token_logprobs"),
        (good(meta={"output_token_logprobs": [-1, -2]}), "output_token_logprobs"),
        (good(meta={"output_token_logprobs": None}), "0 entries"),
        (
            good(meta={"output_token_logprobs": [[-1, 3, 0], ["nan", 5, 0]]}),
            r"output_token_logprobs\[1\] is nan",
        ),
        (good(meta={"finish_reason": {"type": "tired"}}), "finish_reason"),
        (good(meta={"finish_reason": "stop"}), "finish_reason"),
        (good(meta={"weight_versions": "r/7/3"}), "meta_info.weight_versions is 'r/7/3'"),
        (good(meta={"weight_versions": [{"version": "r/7/3", "start": 0, "end": 1}]}), "covers 1 of 2"),
        (good(meta={"weight_versions": [{"version": "r/7/3", "start": 1, "end": 2}]}), "starts at 0"),
        (good(meta={"weight_versions": [{"version": "r/7/3", "start": 0, "end": "2"}]}), "starts at 0"),
        (
            good(meta={"weight_versions": [{"version": "s/7/3", "start": 0, "end": 2}]}),
            "of another run than 'r'",
        ),
        (good(meta={"weight_versions": [7]}), r"weight_versions\[0\] is int"),
    ],
)
def test_rubbish_is_refused_by_the_name_of_its_field(reply: Any, named: str):
    with pytest.raises(RubbishReply, match=named):
        parse(reply)
