"""Requests to an engine with a prefix cache say for which weights they are."""

from __future__ import annotations

import json

import pytest

from milepost.types import EngineCapabilities
from milepost_router.prefix_key import body_for
from milepost_router.record import EngineRecord
from raw_engine import front


def engine(*, version: int = 7, release: str = "sglang 0.5.21", caches: bool = True) -> EngineRecord:
    return EngineRecord(
        "e",
        "http://e",
        run_id="run",
        version=version,
        label=version - 1,
        capabilities=EngineCapabilities(engine=release),
        caches_prefixes=caches,
    )


@pytest.mark.parametrize(
    "given, key",
    [
        ({}, "run/7/6"),
        ({"text": "a"}, "run/7/6"),
        ({"text": "a", "extra_key": None}, "run/7/6"),
        ({"text": "a", "extra_key": ""}, "run/7/6"),
        ({"text": "a", "extra_key": "tenant"}, "tenant|run/7/6"),
        ({"text": ["a", "b"], "extra_key": ["x", "y"]}, ["x|run/7/6", "y|run/7/6"]),
        ({"text": "a", "extra_key": 3}, 3),
        ({"text": 'says "extra_key": 1'}, "run/7/6"),
        ({"tools": [{"extra_key": "not ours"}]}, "run/7/6"),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_the_key_is_added_and_nothing_else_changes(given, key, indent):
    body = ("\n " if indent else "") + json.dumps(given, indent=indent)
    assert json.loads(body_for(engine(), b"/generate", body.encode())) == given | {"extra_key": key}


def test_each_version_has_a_key_of_its_own():
    keys = {json.loads(body_for(engine(version=v), b"/generate", b"{}"))["extra_key"] for v in (1, 2, 3)}
    assert len(keys) == 3


@pytest.mark.parametrize(
    "body", [b"", b"[1, 2]", b"no json", b'{"extra_key": ', b'["extra_key"]', b"\x1f\x8b{"]
)
def test_what_is_no_object_is_left_for_the_engine_to_refuse(body):
    assert body_for(engine(), b"/generate", body) == body


@pytest.mark.parametrize(
    "target, keyed",
    [
        (b"/generate", True),
        (b"/v1/completions", True),
        (b"/v1/chat/completions?x=1", True),
        (b"/v1/responses", True),
        (b"/v1/%63ompletions?x=1", True),
        (b"/v1/responses/abc/cancel", False),
        (b"/v1/tokenize", False),
    ],
)
def test_only_requests_that_sglang_takes_a_key_of_get_one(target, keyed):
    assert (b"run/7/6" in body_for(engine(), target, b'{"text": "a"}')) is keyed


@pytest.mark.parametrize(
    "record",
    [engine(caches=False), engine(version=0), engine(release="milepost 0.5.21")],
)
def test_engines_without_such_a_cache_or_without_a_version_get_bodies_as_they_came(record):
    body = b'{"text": "a"}'
    assert body_for(record, b"/generate", body) is body


async def test_an_engine_with_a_prefix_cache_is_found_and_gets_the_version_it_has_now(raw_engines):
    a, _ = raw_engines
    async with front(a, probe_interval_s=60.0) as router:
        [record] = router.router.fleet
        record.run_id = "run"
        for version in (1, 1, 2):  # by a task, on a kept connection, and after an update
            record.version, record.label = version, version - 1
            assert (await router.ask())[0] == 200
        record.caches_prefixes = False
        assert (await router.ask())[0] == 200
    sent = [json.loads(exchange.body) for exchange in a.exchanges]
    assert [body.pop("extra_key", None) for body in sent] == ["run/1/0", "run/1/0", "run/2/1", None]
    assert all(body == sent[-1] for body in sent)
    assert all(len(x.body) == int(x.headers["content-length"]) for x in a.exchanges)
