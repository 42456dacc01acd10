"""Weight versions, engines, and the weight transaction over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from milepost.types.enums import EngineState, PauseMode, Transport, VersionState


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
    restartable: bool = False
    nccl_version: str = ""
    weight_hook: str = ""


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
class Heard:
    """A heartbeat's answer: the engine's state, and whether its process must be started again."""

    state: EngineState = EngineState.UNSPECIFIED
    restart: bool = False


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
    weight_hook: str = ""
    instance_id: str = ""


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
    nccl_version: str = ""


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
    """What one engine (empty id: every member) needs to reach the bytes of a bucket: one handle a rank.

    Attributes:
      signal: what its loader, `load_format`, is told instead where it has copied from there before: it takes
        all of it, refuses before the first byte, or ends its engine.
    """

    engine_id: str = ""
    handles: tuple[bytes, ...] = ()
    load_format: str = ""
    signal: str = ""


@dataclass(frozen=True, kw_only=True)
class BucketHeader:
    """One bucket of a weight transaction; see UpdateWeightsRequest."""

    transaction_id: str
    fleet_epoch: int
    bucket_index: int
    tensors: tuple[TensorSpec, ...] = ()
    handles: tuple[HandlesOfEngine, ...] = ()
    size_bytes: int = 0
    whole: bool = False
    commit: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryChange:
    """Which engines released or resumed memory, and why others did not."""

    engines: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict[str, str])


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
    committed: Committed | None = None


@dataclass(frozen=True, kw_only=True)
class Committed:
    """The fleet after a weight transaction."""

    version: int = 0
    serving: tuple[str, ...] = ()
    quarantined: Mapping[str, str] = field(default_factory=dict[str, str])
    checksums: Mapping[str, str] = field(default_factory=dict[str, str])
    published: bool = False
