"""The public clients and types against the descriptors: nothing is missing, nothing gets lost on the way."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import numpy as np
import pytest

import milepost.client
from milepost import convert
from milepost import types as t
from milepost.v1 import buffer_pb2, reward_pb2, rollout_pb2, router_pb2, sample_pb2, trainer_pb2, weights_pb2

FILES = (sample_pb2, buffer_pb2, weights_pb2, router_pb2, rollout_pb2, trainer_pb2, reward_pb2)
SERVICES = [s for f in FILES for s in f.DESCRIPTOR.services_by_name.values()]


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def test_all_services_are_there() -> None:
    assert len(SERVICES) == 7


@pytest.mark.parametrize("method", [m for s in SERVICES for m in s.methods], ids=lambda m: m.full_name)
def test_every_rpc_has_a_client_method(method: Any) -> None:
    client = getattr(milepost.client, method.containing_service.name.replace("Service", "Client"))
    found = getattr(client, snake(method.name), None)
    assert inspect.isfunction(found)
    assert inspect.getdoc(found)
    assert f"self._stub.{method.name}" in inspect.getsource(found)


def test_exported_names_exist_and_are_sorted() -> None:
    for module in (milepost, milepost.client):
        assert list(module.__all__) == sorted(module.__all__, key=lambda n: (not n.isupper(), n))
        assert all(hasattr(module, name) for name in module.__all__)


PAIRS = [(k, m) for k, m in convert._MESSAGES.items() if k is not t.Prompt]


@pytest.mark.parametrize(("kind", "message"), PAIRS, ids=lambda x: getattr(x, "__name__", ""))
def test_types_and_messages_have_the_same_fields(kind: type, message: Any) -> None:
    here = {f.name for f in dataclasses.fields(kind)}
    there = {f.name for f in message.DESCRIPTOR.fields}
    assert {f.removesuffix("_s") if f not in there else f for f in here} == there


ENUMS = [
    (t.Outcome, sample_pb2.Outcome), (t.DropReason, sample_pb2.DropReason), (t.OnStale, sample_pb2.OnStale),
    (t.Tail, sample_pb2.Tail), (t.ErrorPolicy, sample_pb2.ErrorPolicy), (t.OnGap, buffer_pb2.OnGap),
    (t.PromptState, buffer_pb2.PromptState), (t.SealStatus, buffer_pb2.SealStatus),
    (t.VersionState, weights_pb2.VersionState), (t.EngineState, router_pb2.EngineState),
    (t.Transport, router_pb2.Transport), (t.PauseMode, router_pb2.PauseMode),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "wire"), ENUMS, ids=lambda x: getattr(x, "__name__", ""))
def test_enums_have_the_same_numbers(ours: Any, wire: Any) -> None:
    prefix = snake(ours.__name__).upper() + "_"
    assert {f"{prefix}{e.name}": int(e) for e in ours} == dict(wire.items())


def test_a_sample_survives_the_wire() -> None:
    sample = t.Sample(
        index=3,
        tokens=np.array([1, 2, 70000], np.int32),
        loss_mask=np.array([0, 1, 1], np.uint8),
        logprobs=np.array([0, -0.5, -1.25], np.float32),
        prompt_length=1,
        version_spans=(t.VersionSpan(start=1, end=3, weight_version=7),),
        version_spans_exact=True,
        reward=0.5,
        reward_parts={"a": 1.0},
        outcome=t.Outcome.TRUNCATED,
        text="x",
        error="late",
        metadata_json="{}",
        engine_id="e0",
        traceparent="00-1-2-01",
    )
    unset = [f.name for f in dataclasses.fields(t.Sample) if not np.any(getattr(sample, f.name))]
    assert unset == [], "give each field of the sample a value, so that none is forgotten"
    prompt = t.Prompt(
        prompt_id="p", messages=(t.ChatMessage(role="user", content="hi"),), sampling=t.SamplingParams(seed=1)
    )
    group = convert.make_group(prompt, attempt=2, samples=[sample])
    back = convert.open_group(group.payload)
    assert group.header.num_tokens == (3,)
    assert group.header.weight_versions == (7,)
    assert group.header.num_loss_tokens == 2
    assert back.prompt.messages == prompt.messages
    assert back.prompt.sampling == t.SamplingParams(seed=1)
    for f in dataclasses.fields(t.Sample):
        np.testing.assert_array_equal(getattr(back.samples[0], f.name), getattr(sample, f.name))


def test_unset_optionals_stay_unset() -> None:
    config = t.RunConfig(max_staleness=0, lease_ttl_s=1.5)
    assert convert.from_proto(t.RunConfig, convert.to_proto(config)) == config
    assert convert.from_proto(t.ResumePoint, convert.to_proto(t.ResumePoint())).published_label is None
    assert (
        convert.from_proto(t.ResumePoint, convert.to_proto(t.ResumePoint(published_label=0))).published_label
        == 0
    )
