"""Domain types <-> protobuf messages, both ways.

    message = to_proto(sample)                   # sample_pb2.Sample
    sample = from_proto(Sample, message)

One plan per dataclass, made once from its fields and the message's descriptor, so that a field added on both
sides needs nothing here. Names agree, except that a `Duration` field `x` is the attribute `x_s` in seconds.
Written out by hand are `Prompt`, for its one-of, and what there is of each group: half the time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC
from enum import IntEnum
from functools import cache
from types import UnionType
from typing import Any, TypeVar

import numpy as np

from milepost import packing
from milepost import types as t
from milepost.v1 import buffer_pb2, reward_pb2, rollout_pb2, router_pb2, sample_pb2, trainer_pb2, weights_pb2

T = TypeVar("T")
Step = Callable[[Any, Any], None]

_MESSAGES: Mapping[type, Any] = {
    t.ChatMessage: sample_pb2.ChatMessage,
    t.SamplingParams: sample_pb2.SamplingParams,
    t.Prompt: sample_pb2.Prompt,
    t.VersionSpan: sample_pb2.VersionSpan,
    t.Sample: sample_pb2.Sample,
    t.GroupHeader: sample_pb2.GroupHeader,
    t.Group: sample_pb2.Group,
    t.GroupPayload: sample_pb2.GroupPayload,
    t.RunConfig: sample_pb2.RunConfig,
    t.Run: sample_pb2.Run,
    t.SourcePosition: buffer_pb2.OpenSourceResponse,
    t.PromptItem: buffer_pb2.PromptItem,
    t.PutPromptsResult: buffer_pb2.PutPromptsResponse,
    t.LeaseKey: buffer_pb2.LeaseKey,
    t.PromptLease: buffer_pb2.PromptLease,
    t.PromptLeases: buffer_pb2.LeasePromptsResponse,
    t.RenewedLeases: buffer_pb2.RenewLeasesResponse,
    t.ReleaseResult: buffer_pb2.ReleasePromptsResponse,
    t.CancelResult: buffer_pb2.CancelPromptsResponse,
    t.SealResult: buffer_pb2.SealResult,
    t.StepGroup: buffer_pb2.StepGroup,
    t.StepPending: buffer_pb2.StepPending,
    t.StepLease: buffer_pb2.LeaseStepResponse,
    t.DroppedGroup: buffer_pb2.DroppedGroup,
    t.CommitResult: buffer_pb2.CommitStepResponse,
    t.StepManifest: buffer_pb2.StepManifest,
    t.ResumePoint: buffer_pb2.ResumeConsumerResponse,
    t.TrimResult: buffer_pb2.TrimCheckpointedResponse,
    t.LedgerRow: buffer_pb2.LedgerRow,
    t.RunStats: buffer_pb2.RunStats,
    t.Witness: buffer_pb2.Witness,
    t.AuditReport: buffer_pb2.AuditLedgerResponse,
    t.WeightVersion: weights_pb2.WeightVersion,
    t.EngineCapabilities: router_pb2.EngineCapabilities,
    t.Engine: router_pb2.Engine,
    t.Registration: router_pb2.RegisterEngineResponse,
    t.Heard: router_pb2.HeartbeatResponse,
    t.Fleet: router_pb2.ListEnginesResponse,
    t.TensorSpec: router_pb2.TensorSpec,
    t.WeightMember: router_pb2.WeightMember,
    t.PrepareRequest: router_pb2.PrepareWeightsRequest,
    t.Prepared: router_pb2.PrepareWeightsResponse,
    t.HandlesOfEngine: router_pb2.HandlesOfEngine,
    t.BucketHeader: router_pb2.UpdateWeightsRequest,
    t.EngineAck: router_pb2.EngineAck,
    t.BucketAck: router_pb2.UpdateWeightsResponse,
    t.Committed: router_pb2.CommitWeightsResponse,
    t.RolloutOptions: rollout_pb2.RolloutOptions,
    t.Trajectories: rollout_pb2.RolloutResponse,
    t.Evaluation: rollout_pb2.EvaluateResponse,
    t.RolloutStatus: rollout_pb2.GetStatusResponse,
    t.TrainerStatus: trainer_pb2.GetTrainerStatusResponse,
    t.SavedCheckpoint: trainer_pb2.SaveCheckpointResponse,
    t.StepMetrics: trainer_pb2.WatchStepsResponse,
    t.RewardParts: reward_pb2.RewardParts,
    t.Scores: reward_pb2.ScoreResponse,
    t.EnvironmentTurn: reward_pb2.StepResponse,
}


def to_proto(value: Any) -> Any:
    """The message of a domain value."""
    message = _MESSAGES[type(value)]()
    fill(message, value)
    return message


def fill(message: Any, value: Any) -> None:
    """Writes a domain value into a message of its type, or of one with the same fields."""
    if by_hand := _BY_HAND.get(type(value)):
        by_hand[0](message, value)
        return
    for write, _ in _plan(type(value)).values():
        write(message, value)


def from_proto(kind: type[T], message: Any) -> T:
    """The domain value of a message."""
    if by_hand := _BY_HAND.get(kind):
        return by_hand[1](message)
    return kind(**{name: read(message) for name, (_, read) in _plan(kind).items()})


def make_group(
    prompt: t.Prompt, *, attempt: int, samples: Sequence[t.Sample], traceparent: str = ""
) -> t.Group:
    """Packs the samples of one prompt, ordered by index, into a group with a header that fits them.

    Args:
      prompt: as it was leased.
      attempt: of the lease.
      samples: all of them.
      traceparent: of the rollout; empty: it is not traced.
    """
    ordered = sorted(samples, key=lambda s: s.index)
    payload = pack_payload(prompt, ordered)
    versions = {span.weight_version for s in ordered for span in s.version_spans}
    header = t.GroupHeader(
        prompt_id=prompt.prompt_id,
        attempt=attempt,
        num_tokens=tuple(len(s.tokens) for s in ordered),
        outcomes=tuple(s.outcome for s in ordered),
        weight_versions=tuple(sorted(versions)),
        rewards=tuple(s.reward for s in ordered),
        num_loss_tokens=sum(int(np.count_nonzero(s.loss_mask)) for s in ordered),
        digest=hashlib.sha256(payload).digest(),
        traceparent=traceparent,
    )
    return t.Group(header=header, payload=payload)


def pack_payload(prompt: t.Prompt, samples: Sequence[t.Sample]) -> bytes:
    """The bytes of a `GroupPayload`: arrays go into them from where they lie, copied once."""
    head = sample_pb2.GroupPayload(prompt=to_proto(prompt)).SerializeToString()
    return packing.pack_payload(head, [(_facts_of(sample), sample) for sample in samples])


def pack_sample(sample: t.Sample) -> bytes:
    """The bytes of a `Sample`, packed like that."""
    return packing.pack_sample(_facts_of(sample), sample)


def _facts_of(sample: t.Sample) -> bytes:
    message = sample_pb2.Sample()
    _fill_all_but_arrays(message, sample)
    return message.SerializeToString()


def open_group(payload: bytes) -> t.GroupPayload:
    """Unpacks a group's payload; arrays are read-only views of the message's bytes."""
    return _read_payload(sample_pb2.GroupPayload.FromString(payload))


# ---------------------------------------------------------------------------------------------- plans

Read = Callable[[Any], Any]


@cache
def _plan(kind: type) -> dict[str, tuple[Step, Read]]:
    """For each attribute of a dataclass: how to write it into the message, and how to read it from there."""
    hints = typing.get_type_hints(kind)
    described = _MESSAGES[kind].DESCRIPTOR.fields_by_name
    plan: dict[str, tuple[Step, Read]] = {}
    for f in dataclasses.fields(kind):
        proto_name = f.name if f.name in described else f.name.removesuffix("_s")
        plan[f.name] = _field(f, hints[f.name], described[proto_name])
    return plan


def _field(f: dataclasses.Field[Any], hint: Any, described: Any) -> tuple[Step, Read]:
    name, attr = described.name, f.name
    inner, optional = _strip_none(hint)
    if described.message_type is not None and described.message_type.full_name == "google.protobuf.Duration":
        return _duration(name, attr, optional=optional)
    if described.message_type is not None and described.message_type.full_name == "google.protobuf.Timestamp":
        return _timestamp(name, attr)
    if "dtype" in f.metadata:
        return _array(name, attr, f.metadata["dtype"])
    origin = typing.get_origin(inner)
    if origin is tuple:
        return _repeated(name, attr, typing.get_args(inner)[0])
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(name, attr)
    if dataclasses.is_dataclass(inner):
        return _nested(name, attr, typing.cast(type, inner), optional=optional)
    return _scalar(name, attr, inner, optional=optional)


def _strip_none(hint: Any) -> tuple[Any, bool]:
    if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union:
        rest = [a for a in typing.get_args(hint) if a is not type(None)]
        return rest[0], True
    return hint, False


def _scalar(name: str, attr: str, kind: Any, *, optional: bool) -> tuple[Step, Read]:
    def write(message: Any, value: Any) -> None:
        v = getattr(value, attr)
        if v is not None:
            setattr(message, name, v)

    convert: Callable[[Any], Any] | None = (
        kind if isinstance(kind, type) and issubclass(kind, IntEnum) else None
    )

    def read(message: Any) -> Any:
        if optional and not message.HasField(name):
            return None
        v = getattr(message, name)
        return convert(v) if convert else v

    return write, read


def _nested(name: str, attr: str, kind: type, *, optional: bool) -> tuple[Step, Read]:
    def write(message: Any, value: Any) -> None:
        v = getattr(value, attr)
        if v is not None:
            target = getattr(message, name)
            target.SetInParent()
            fill(target, v)

    def read(message: Any) -> Any:
        if optional and not message.HasField(name):
            return None
        return from_proto(kind, getattr(message, name))

    return write, read


def _repeated(name: str, attr: str, kind: Any) -> tuple[Step, Read]:
    if dataclasses.is_dataclass(kind):
        element = typing.cast(type, kind)

        def write_messages(message: Any, value: Any) -> None:
            target = getattr(message, name)
            for v in getattr(value, attr):
                fill(target.add(), v)

        def read_messages(message: Any) -> tuple[Any, ...]:
            return tuple(from_proto(element, x) for x in getattr(message, name))

        return write_messages, read_messages

    def write(message: Any, value: Any) -> None:
        getattr(message, name).extend(getattr(value, attr))

    if isinstance(kind, type) and issubclass(kind, IntEnum):
        enum: Callable[[Any], Any] = kind
        return write, lambda m: tuple(enum(x) for x in getattr(m, name))
    return write, lambda m: tuple(getattr(m, name))


def _mapping(name: str, attr: str) -> tuple[Step, Read]:
    def write(message: Any, value: Any) -> None:
        getattr(message, name).update(getattr(value, attr))

    return write, lambda m: dict(getattr(m, name))


def _array(name: str, attr: str, dtype: str) -> tuple[Step, Read]:
    wire = np.dtype(dtype)

    def write(message: Any, value: Any) -> None:
        setattr(message, name, np.ascontiguousarray(getattr(value, attr), dtype=wire).tobytes())

    return write, lambda m: np.frombuffer(getattr(m, name), dtype=wire)


def _duration(name: str, attr: str, *, optional: bool) -> tuple[Step, Read]:
    def write(message: Any, value: Any) -> None:
        v = getattr(value, attr)
        if v is not None:
            getattr(message, name).FromNanoseconds(round(v * 1e9))

    def read(message: Any) -> Any:
        if optional and not message.HasField(name):
            return None
        return getattr(message, name).ToNanoseconds() / 1e9

    return write, read


def _timestamp(name: str, attr: str) -> tuple[Step, Read]:
    def write(message: Any, value: Any) -> None:
        v = getattr(value, attr)
        if v is not None:
            getattr(message, name).FromDatetime(v)

    return write, lambda m: getattr(m, name).ToDatetime(tzinfo=UTC) if m.HasField(name) else None


# ---------------------------------------------------------------------------------------------- by hand


def _fill_prompt(message: Any, value: t.Prompt) -> None:
    message.prompt_id = value.prompt_id
    if value.text is not None:
        message.text = value.text
    elif value.messages is not None:
        for m in value.messages:
            message.chat.messages.add(role=m.role, content=m.content)
    elif value.input_ids is not None:
        message.input_ids = np.ascontiguousarray(value.input_ids, dtype="<i4").tobytes()
    message.label = value.label
    message.metadata_json = value.metadata_json
    message.reward = value.reward
    message.traceparent = value.traceparent
    if value.sampling is not None:
        message.sampling.SetInParent()
        fill(message.sampling, value.sampling)


def _read_prompt(message: Any) -> t.Prompt:
    which = message.WhichOneof("input")
    chat = tuple(from_proto(t.ChatMessage, m) for m in message.chat.messages) if which == "chat" else None
    return t.Prompt(
        prompt_id=message.prompt_id,
        text=message.text if which == "text" else None,
        messages=chat,
        input_ids=np.frombuffer(message.input_ids, dtype="<i4") if which == "input_ids" else None,
        label=message.label,
        metadata_json=message.metadata_json,
        sampling=from_proto(t.SamplingParams, message.sampling) if message.HasField("sampling") else None,
        reward=message.reward,
        traceparent=message.traceparent,
    )


def _fill_sample(message: Any, value: t.Sample) -> None:
    message.tokens = _to_bytes(value.tokens, packing.INT32)
    message.loss_mask = _to_bytes(value.loss_mask, packing.UINT8)
    message.logprobs = _to_bytes(value.logprobs, packing.FLOAT32)
    _fill_all_but_arrays(message, value)


def _fill_all_but_arrays(message: Any, value: t.Sample) -> None:
    """A field that says nothing is left out: looking at it costs less than setting it."""
    if value.index:
        message.index = value.index
    if value.prompt_length:
        message.prompt_length = value.prompt_length
    for span in value.version_spans:
        message.version_spans.add(start=span.start, end=span.end, weight_version=span.weight_version)
    if value.version_spans_exact:
        message.version_spans_exact = True
    if value.reward:
        message.reward = value.reward
    if value.reward_parts:
        message.reward_parts.update(value.reward_parts)
    message.outcome = value.outcome
    if value.text:
        message.text = value.text
    if value.error:
        message.error = value.error
    if value.metadata_json:
        message.metadata_json = value.metadata_json
    if value.engine_id:
        message.engine_id = value.engine_id
    if value.traceparent:
        message.traceparent = value.traceparent


def _made(kind: type[T], **fields: Any) -> T:
    """A frozen dataclass of all its fields at once; its own `__init__` makes a call for each."""
    value = object.__new__(kind)
    value.__dict__.update(fields)
    return value


def _read_sample(message: Any) -> t.Sample:
    return _made(
        t.Sample,
        index=message.index,
        tokens=np.frombuffer(message.tokens, packing.INT32),
        loss_mask=np.frombuffer(message.loss_mask, packing.UINT8),
        logprobs=np.frombuffer(message.logprobs, packing.FLOAT32),
        prompt_length=message.prompt_length,
        version_spans=tuple([_read_span(span) for span in message.version_spans]),
        version_spans_exact=message.version_spans_exact,
        reward=message.reward,
        reward_parts=dict(message.reward_parts),
        outcome=_OUTCOMES.get(message.outcome) or t.Outcome(message.outcome),
        text=message.text,
        error=message.error,
        metadata_json=message.metadata_json,
        engine_id=message.engine_id,
        traceparent=message.traceparent,
    )


def _read_span(message: Any) -> t.VersionSpan:
    return _made(t.VersionSpan, start=message.start, end=message.end, weight_version=message.weight_version)


def _fill_header(message: Any, value: t.GroupHeader) -> None:
    message.prompt_id = value.prompt_id
    message.attempt = value.attempt
    message.num_tokens.extend(value.num_tokens)
    message.outcomes.extend(value.outcomes)
    message.weight_versions.extend(value.weight_versions)
    message.rewards.extend(value.rewards)
    message.num_loss_tokens = value.num_loss_tokens
    message.digest = value.digest
    message.traceparent = value.traceparent


def _read_header(message: Any) -> t.GroupHeader:
    return _made(
        t.GroupHeader,
        prompt_id=message.prompt_id,
        attempt=message.attempt,
        num_tokens=tuple(message.num_tokens),
        outcomes=tuple([_OUTCOMES.get(o) or t.Outcome(o) for o in message.outcomes]),
        weight_versions=tuple(message.weight_versions),
        rewards=tuple(message.rewards),
        num_loss_tokens=message.num_loss_tokens,
        digest=message.digest,
        traceparent=message.traceparent,
    )


def _fill_step_group(message: Any, value: t.StepGroup) -> None:
    message.prompt_id = value.prompt_id
    message.position = value.position
    message.attempt = value.attempt
    message.num_tokens.extend(value.num_tokens)
    message.staleness = value.staleness
    message.payload_bytes = value.payload_bytes
    message.rewards.extend(value.rewards)
    message.num_loss_tokens = value.num_loss_tokens
    message.traceparent = value.traceparent


def _read_step_group(message: Any) -> t.StepGroup:
    return _made(
        t.StepGroup,
        prompt_id=message.prompt_id,
        position=message.position,
        attempt=message.attempt,
        num_tokens=tuple(message.num_tokens),
        staleness=message.staleness,
        payload_bytes=message.payload_bytes,
        rewards=tuple(message.rewards),
        num_loss_tokens=message.num_loss_tokens,
        traceparent=message.traceparent,
    )


def _fill_seal_result(message: Any, value: t.SealResult) -> None:
    message.prompt_id = value.prompt_id
    message.status = value.status
    message.message = value.message


def _read_seal_result(message: Any) -> t.SealResult:
    status = t.SealStatus(message.status)
    return _made(t.SealResult, prompt_id=message.prompt_id, status=status, message=message.message)


def _to_bytes(array: np.ndarray[Any, Any], wire: np.dtype[Any]) -> bytes:
    return (array if array.dtype == wire else array.astype(wire)).tobytes()


def _read_payload(message: Any) -> t.GroupPayload:
    samples = tuple([_read_sample(sample) for sample in message.samples])
    return _made(t.GroupPayload, prompt=_read_prompt(message.prompt), samples=samples)


_OUTCOMES = {int(outcome): outcome for outcome in t.Outcome if outcome}
_BY_HAND: Mapping[type, tuple[Step, Read]] = {
    t.Prompt: (_fill_prompt, _read_prompt),
    t.Sample: (_fill_sample, _read_sample),
    t.GroupHeader: (_fill_header, _read_header),
    t.StepGroup: (_fill_step_group, _read_step_group),
    t.SealResult: (_fill_seal_result, _read_seal_result),
}
