"""Enumerations: the numbers are those of the protos."""

from __future__ import annotations

from enum import IntEnum


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
