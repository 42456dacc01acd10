"""What was prepared of a weight transaction, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from milepost import types as t
from milepost_router.groups import COLLECTIVE, Group
from milepost_router.version_string import LoadedVersion


class Phase(Enum):
    """Where a transaction stands."""

    PREPARED = auto()
    TRANSFERRING = auto()
    COMMITTING = auto()
    COMMITTED = auto()
    ABORTED = auto()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was prepared; never changes.

    Attributes:
      transaction_id: its name.
      request: the trainer's request.
      version: the number.
      loaded: the number with run and label, the string of a complete engine.
      fleet_epoch: of the fleet when its members were fixed.
      group: process group (gloo, nccl).
      group_is_open: its members are in it already.
      expires_at: end of its time on the loop's clock.
      join_timeout_s, bucket_timeout_s: deadlines of joining the process group, and of one bucket.
      straggler_s: how much later than the first member of a collective the others may have a bucket.
      verify_checksum: compare checksums before the commit.
    """

    transaction_id: str
    request: t.PrepareRequest
    version: int
    fleet_epoch: int
    group: Group | None
    group_is_open: bool
    expires_at: float
    join_timeout_s: float
    bucket_timeout_s: float
    straggler_s: float
    verify_checksum: bool
    manifest: dict[str, t.TensorSpec] = field(default_factory=dict[str, t.TensorSpec])

    @property
    def loaded(self) -> LoadedVersion:
        """What a complete engine carries."""
        return LoadedVersion(self.request.run_id, self.version, self.request.label)

    @property
    def collective(self) -> bool:
        """One member's failure is everybody's."""
        return self.request.transport in COLLECTIVE

    @property
    def group_name(self) -> str:
        """Its name; empty: none."""
        return self.group.name if self.group else ""
