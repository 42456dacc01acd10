"""Runs, leases, steps and accounts: what the buffer answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from milepost.types.enums import DropReason, ErrorPolicy, OnStale, PromptState, SealStatus, Tail
from milepost.types.samples import Prompt, SamplingParams


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
    """Which leases are lost; the others last `ttl_s` from now.

    `unnamed` are leases of the instance that the request did not name, where it said that it names all.
    """

    lost: tuple[LeaseKey, ...] = ()
    ttl_s: float = 0.0
    unnamed: tuple[LeaseKey, ...] = ()


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
    traceparent: str = ""


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
    """A step's groups in order; empty with `pending` set when there is none yet.

    `payloads` are those of the first groups, as many as came along with the lease.
    """

    groups: tuple[StepGroup, ...] = ()
    pending: StepPending | None = None
    checkpoint_wanted: bool = False
    repeated_lease: bool = False
    max_staleness: int = 0
    published_label: int = 0
    payloads: tuple[bytes, ...] = ()


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
