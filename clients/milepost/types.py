"""The domain types: frozen dataclasses that services and users work with. No protobuf here.

A field has the name of its proto field, with two exceptions: durations are `float` seconds and carry the
suffix `_s`, and `Prompt`'s one-of is three optional fields. The proto comments are the reference for meaning,
unit and range; `milepost.convert` turns these into messages and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
UInt8Array = NDArray[np.uint8]
Float32Array = NDArray[np.float32]


def _i32() -> Any:
    return field(default_factory=lambda: np.empty(0, np.int32), metadata={"dtype": "<i4"})


def _u8() -> Any:
    return field(default_factory=lambda: np.empty(0, np.uint8), metadata={"dtype": "|u1"})


def _f32() -> Any:
    return field(default_factory=lambda: np.empty(0, np.float32), metadata={"dtype": "<f4"})


class Outcome(IntEnum):
    """How the making of one sample ended."""

    UNSPECIFIED = 0
    COMPLETED = 1
    TRUNCATED = 2
    ABORTED = 3
    ENV_ERROR = 4
    REWARD_ERROR = 5
    ENGINE_ERROR = 6

    @property
    def is_error(self) -> bool:
        """True where the sample must not be trained on."""
        return self not in (Outcome.COMPLETED, Outcome.TRUNCATED)


class DropReason(IntEnum):
    """Why a prompt left the ledger without being trained on."""

    UNSPECIFIED = 0
    FILTER = 1
    REWARD_ERROR = 2
    ENV_ERROR = 3
    ENGINE_ERROR = 4
    INVALID = 5
    CANCELLED = 6
    ATTEMPTS = 7
    STALE = 8
    TAIL = 9
    GAP = 10
    POISON = 11


class OnStale(IntEnum):
    """What to do with a group above the staleness bound."""

    UNSPECIFIED = 0
    REQUEUE = 1
    WAIT = 2
    DROP = 3


class Tail(IntEnum):
    """What to do with groups left over when all sources are closed."""

    UNSPECIFIED = 0
    TRAIN = 1
    DROP = 2


class ErrorPolicy(IntEnum):
    """What to do with a group in which a sample has an error outcome."""

    UNSPECIFIED = 0
    RETRY = 1
    DROP = 2
    MASK = 3


class OnGap(IntEnum):
    """What to do when payloads of the steps after a checkpoint are gone."""

    UNSPECIFIED = 0
    FAIL = 1
    REGENERATE = 2
    DROP = 3


class PromptState(IntEnum):
    """Where a prompt stands in the ledger."""

    UNSPECIFIED = 0
    WAITING = 1
    ROLLING = 2
    READY = 3
    ASSIGNED = 4
    TRAINED = 5
    DROPPED = 6


class SealStatus(IntEnum):
    """What became of a group that was put."""

    UNSPECIFIED = 0
    SEALED = 1
    DUPLICATE = 2
    LEASE_LOST = 3
    CONFLICT = 4
    UNKNOWN_VERSION = 5
    INVALID = 6
    UNKNOWN_PROMPT = 7


class VersionState(IntEnum):
    """State of a weight version's number."""

    UNSPECIFIED = 0
    RESERVED = 1
    PUBLISHED = 2
    VOID = 3


class EngineState(IntEnum):
    """State of an engine."""

    UNSPECIFIED = 0
    JOINING = 1
    STALE = 2
    SERVING = 3
    UPDATING = 4
    DRAINING = 5
    QUARANTINED = 6
    DEAD = 7


class Transport(IntEnum):
    """How bytes of weights travel."""

    UNSPECIFIED = 0
    GLOO = 1
    SHM = 2
    DISK = 3
    NCCL = 4
    CUDA_IPC = 5


class PauseMode(IntEnum):
    """How running requests are treated while the weights change."""

    UNSPECIFIED = 0
    RETRACT = 1
    IN_PLACE = 2
    ABORT = 3


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn; None takes the run's value, then the engine's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What is rolled out. Exactly one of `text`, `messages` and `input_ids` (int32, [num_tokens]) is set."""

    prompt_id: str
    text: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    input_ids: Int32Array | None = None
    label: str = ""
    metadata_json: str = ""
    sampling: SamplingParams | None = None
    reward: str = ""
    traceparent: str = ""


@dataclass(frozen=True, kw_only=True)
class VersionSpan:
    """Tokens [start, end) of `Sample.tokens` were generated under `weight_version`."""

    start: int
    end: int
    weight_version: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One trainable token sequence.

    `tokens` int32, `loss_mask` uint8 and `logprobs` float32 (nats, at the sampling temperature, 0 where the
    mask is 0) have one length: prompt and response.
    """

    index: int = 0
    tokens: Int32Array = _i32()
    loss_mask: UInt8Array = _u8()
    logprobs: Float32Array = _f32()
    prompt_length: int = 0
    version_spans: tuple[VersionSpan, ...] = ()
    version_spans_exact: bool = False
    reward: float = float("nan")
    reward_parts: Mapping[str, float] = field(default_factory=dict[str, float])
    outcome: Outcome = Outcome.UNSPECIFIED
    text: str = ""
    error: str = ""
    metadata_json: str = ""
    engine_id: str = ""


@dataclass(frozen=True, kw_only=True)
class GroupHeader:
    """What the ledger checks of a group; per-sample fields are ordered by sample index."""

    prompt_id: str
    attempt: int
    num_tokens: tuple[int, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    weight_versions: tuple[int, ...] = ()
    rewards: tuple[float, ...] = ()
    num_loss_tokens: int = 0
    digest: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The samples of one prompt, sealed as a whole; `payload` is a serialized GroupPayload."""

    header: GroupHeader
    payload: bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupPayload:
    """What a learner reads of a group."""

    prompt: Prompt
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What all services of a run agree on; None is unset (the buffer fills in the defaults)."""

    groups_per_step: int | None = None
    samples_per_prompt: int | None = None
    max_staleness: int | None = None
    publish_every: int | None = None
    on_stale: OnStale = OnStale.UNSPECIFIED
    stale_attempts: int | None = None
    max_attempts: int | None = None
    lease_ttl_s: float | None = None
    max_group_bytes: int | None = None
    max_payload_bytes: int | None = None
    tail: Tail = Tail.UNSPECIFIED
    error_policy: ErrorPolicy = ErrorPolicy.UNSPECIFIED
    sampling: SamplingParams | None = None
    reward: str = ""
    filter_equal_rewards: bool | None = None
    max_lag_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as the ledger knows it."""

    run_id: str
    config: RunConfig
    created_at: datetime | None = None
    committed_step: int = 0
    weight_version: int = 0
    weight_label: int = 0
    term: int = 0
    trimmed_step: int = 0
    finished: bool = False


@dataclass(frozen=True, kw_only=True)
class SourcePosition:
    """Where a source of prompts stands."""

    cursor: str = ""
    credits: int = 0
    closed: bool = False


@dataclass(frozen=True, kw_only=True)
class PromptItem:
    """One prompt and the source's cursor after it."""

    prompt: Prompt
    cursor: str = ""


@dataclass(frozen=True, kw_only=True)
class PutPromptsResult:
    """How much of a batch was accepted."""

    accepted: int = 0
    duplicates: int = 0
    credits: int = 0
    cursor: str = ""


@dataclass(frozen=True, kw_only=True)
class LeaseKey:
    """Names one lease of a prompt."""

    prompt_id: str
    attempt: int


@dataclass(frozen=True, kw_only=True)
class PromptLease:
    """A prompt claimed by one gateway for `ttl_s` seconds from now."""

    prompt: Prompt
    attempt: int
    min_version: int = 0
    ttl_s: float = 0.0
    num_samples: int = 0
    label: int = 0

    @property
    def key(self) -> LeaseKey:
        """The name of this lease."""
        return LeaseKey(prompt_id=self.prompt.prompt_id, attempt=self.attempt)


@dataclass(frozen=True, kw_only=True)
class PromptLeases:
    """Leases, and why there are fewer than wanted."""

    leases: tuple[PromptLease, ...] = ()
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class RenewedLeases:
    """Which leases are lost; the others last `ttl_s` from now."""

    lost: tuple[LeaseKey, ...] = ()
    ttl_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ReleaseResult:
    """What became of released leases."""

    released: int = 0
    dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class CancelResult:
    """What was cancelled and what could not be."""

    cancelled: tuple[str, ...] = ()
    not_cancelled: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SealResult:
    """What became of one group that was put."""

    prompt_id: str
    status: SealStatus
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class StepGroup:
    """One group of a step, without its payload."""

    prompt_id: str
    position: int = 0
    attempt: int = 0
    num_tokens: tuple[int, ...] = ()
    staleness: int = 0
    payload_bytes: int = 0
    rewards: tuple[float, ...] = ()
    num_loss_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class StepPending:
    """Why a step cannot be leased yet: who waits for whom."""

    reason: str = ""
    needed: int = 0
    ready: int = 0
    rolling: int = 0
    waiting: int = 0


@dataclass(frozen=True, kw_only=True)
class StepLease:
    """A step's groups in order; empty with `pending` set when there is none yet."""

    groups: tuple[StepGroup, ...] = ()
    pending: StepPending | None = None
    checkpoint_wanted: bool = False
    repeated_lease: bool = False
    max_staleness: int = 0
    published_label: int = 0


@dataclass(frozen=True, kw_only=True)
class DroppedGroup:
    """A group that the trainer left out of the optimizer step."""

    prompt_id: str
    reason: DropReason


@dataclass(frozen=True, kw_only=True)
class CommitResult:
    """A step is committed."""

    committed_step: int = 0
    checkpoint_wanted: bool = False
    repeated_commit: bool = False


@dataclass(frozen=True, kw_only=True)
class StepManifest:
    """The groups of one step, as a checkpoint or a step log remembers them."""

    step: int
    prompt_ids: tuple[str, ...] = ()
    dropped: tuple[DroppedGroup, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where a consumer stands."""

    term: int = 0
    committed_step: int = 0
    published_label: int | None = None
    published_version: int = 0
    trimmed_step: int = 0
    next_step: int = 0
    poison_step: int = 0


@dataclass(frozen=True, kw_only=True)
class TrimResult:
    """Payloads up to `trimmed_step` are gone."""

    trimmed_step: int = 0
    freed: int = 0


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One prompt's account."""

    prompt_id: str
    state: PromptState
    attempt: int = 0
    step: int = 0
    position: int = 0
    staleness: int = 0
    max_staleness: int = 0
    drop_reason: DropReason = DropReason.UNSPECIFIED
    detail: str = ""
    label: int | None = None
    stale_count: int = 0
    failed_attempts: int = 0
    source_id: str = ""
    tombstone: bool = False


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """Counts of one run at one instant."""

    run_id: str
    accepted: int = 0
    waiting: int = 0
    rolling: int = 0
    ready: int = 0
    assigned: int = 0
    trained: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])
    admissible: int = 0
    credits: int = 0
    payload_bytes: int = 0
    max_payload_bytes: int = 0
    committed_step: int = 0
    leased_step: int = 0
    weight_version: int = 0
    weight_label: int = 0
    trimmed_step: int = 0
    open_sources: int = 0
    waiting_for: str = ""
    max_staleness_seen: int = 0
    term: int = 0
    expired_leases: int = 0
    stale_requeues: int = 0


@dataclass(frozen=True, kw_only=True)
class Witness:
    """What somebody outside of Redis knows."""

    name: str
    steps: tuple[StepManifest, ...] = ()
    accepted_prompt_ids: tuple[str, ...] = ()
    weight_version: int = 0


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The audit: accepted = trained + dropped + in flight, nothing lost, nothing twice."""

    accepted: int = 0
    trained: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])
    in_flight: int = 0
    lost: int = 0
    twice: int = 0
    problems: tuple[str, ...] = ()
    beyond_bound: int = 0
    max_staleness_seen: int = 0

    @property
    def closes(self) -> bool:
        """True when every sum adds up."""
        return not self.problems and not self.lost and not self.twice


@dataclass(frozen=True, kw_only=True)
class WeightVersion:
    """One weight version: a number, and the step whose weights it is."""

    version: int
    label: int = 0
    state: VersionState = VersionState.UNSPECIFIED
    term: int = 0
    members: tuple[str, ...] = ()
    published_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class EngineCapabilities:
    """What an engine can do."""

    engine: str = ""
    update_session: bool = False
    version_spans: bool = False
    checksum: bool = False
    transports: tuple[Transport, ...] = ()
    tensor_parallel_size: int = 1
    gpu_uuids: tuple[str, ...] = ()
    context_length: int = 0


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine as the router sees it."""

    engine_id: str
    url: str
    run_id: str = ""
    instance_id: str = ""
    capabilities: EngineCapabilities | None = None
    state: EngineState = EngineState.UNSPECIFIED
    weight_version: int = 0
    weight_label: int = 0
    in_flight: int = 0
    detail: str = ""
    last_seen_ago_s: float = 0.0
    requests_total: int = 0
    failures_total: int = 0


@dataclass(frozen=True, kw_only=True)
class Registration:
    """A registered engine is to send a heartbeat every `heartbeat_interval_s`."""

    heartbeat_interval_s: float
    engine: Engine


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The engines, ordered by id, at one fleet epoch."""

    engines: tuple[Engine, ...] = ()
    fleet_epoch: int = 0


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor: Hugging Face name, dtype as torch names it, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WeightMember:
    """An engine that takes part in a weight transaction."""

    engine_id: str
    rank_offset: int = 0
    tensor_parallel_size: int = 1
    gpu_uuids: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """Opens a weight transaction; see PrepareWeightsRequest."""

    run_id: str
    term: int
    label: int
    attempt: int = 1
    version: int = 0
    manifest: tuple[TensorSpec, ...] = ()
    transport: Transport = Transport.UNSPECIFIED
    pause_mode: PauseMode = PauseMode.UNSPECIFIED
    master_address: str = ""
    master_port: int = 0
    engine_ids: tuple[str, ...] = ()
    timeout_s: float | None = None
    group_name: str = ""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An open weight transaction; without members none was opened."""

    transaction_id: str = ""
    version: int = 0
    fleet_epoch: int = 0
    members: tuple[WeightMember, ...] = ()
    group_name: str = ""
    world_size: int = 0


@dataclass(frozen=True, kw_only=True)
class HandlesOfEngine:
    """What one engine (empty id: every member) needs to reach the bytes of a bucket: one handle a rank."""

    engine_id: str = ""
    handles: tuple[bytes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BucketHeader:
    """One bucket of a weight transaction; see UpdateWeightsRequest."""

    transaction_id: str
    fleet_epoch: int
    bucket_index: int
    tensors: tuple[TensorSpec, ...] = ()
    handles: tuple[HandlesOfEngine, ...] = ()
    size_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineAck:
    """What one engine said to one bucket."""

    engine_id: str
    ok: bool = False
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class BucketAck:
    """What the members said to one bucket."""

    bucket_index: int = 0
    acks: tuple[EngineAck, ...] = ()
    group_broken: bool = False


@dataclass(frozen=True, kw_only=True)
class Committed:
    """The fleet after a weight transaction."""

    version: int = 0
    serving: tuple[str, ...] = ()
    quarantined: Mapping[str, str] = field(default_factory=dict[str, str])
    checksums: Mapping[str, str] = field(default_factory=dict[str, str])
    published: bool = False


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """How a stream of prompts is rolled out."""

    samples_per_prompt: int = 0
    sampling: SamplingParams | None = None
    reward: str = ""
    run_id: str = ""
    weight_version: int = 0
    max_concurrent_groups: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectories:
    """The scored samples of one prompt, or why it was refused."""

    prompt_id: str
    samples: tuple[Sample, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out prompts scored at one weight version."""

    weight_version: int = 0
    weight_label: int = 0
    reward_mean: float = 0.0
    num_scored: int = 0
    num_requested: int = 0
    failures: Mapping[str, int] = field(default_factory=dict[str, int])
    response_tokens_mean: float = 0.0
    duration_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RolloutStatus:
    """What a gateway is doing."""

    instance_id: str = ""
    run_id: str = ""
    paused: bool = False
    groups_in_flight: int = 0
    samples_in_flight: int = 0
    groups_sealed: int = 0
    tokens_generated: int = 0
    outcomes: Mapping[str, int] = field(default_factory=dict[str, int])
    reward_mean: float = 0.0
    waiting_for: str = ""
    last_evaluation: Evaluation | None = None
    uptime_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainerStatus:
    """What a trainer is doing."""

    run_id: str = ""
    term: int = 0
    phase: str = ""
    waiting_for: str = ""
    step: int = 0
    published_step: int = 0
    weight_version: int = 0
    checkpoint_step: int = 0
    world_size: int = 0
    uptime_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint; step 0 with an empty path when it is not there yet."""

    step: int = 0
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """The metrics of one step by name."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class RewardParts:
    """Named parts of one sample's reward."""

    parts: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One reward a sample, in order, and optionally named parts."""

    rewards: tuple[float, ...] = ()
    parts: tuple[RewardParts, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EnvironmentTurn:
    """What an environment answers."""

    messages: tuple[ChatMessage, ...] = ()
    done: bool = False
    reward: float = 0.0
