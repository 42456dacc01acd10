"""Process groups of weights (gloo, nccl): one a run, which lives as long as its members do.

    prepare ── same members, and rank 0 holds it still ──> used again ──┐
       │ else                                                           │
       └── the members leave what they had, a new one is opened ────────┴── all got the weights ──> kept
                                                                        │
                                                                        └── else ──> given up

To open a group costs a second and memory on every GPU, so it is not done for every version. A member is the
process, not its name: an engine that was started again is another one. What was given up is nobody's any
more: its members leave it, or are started again where they hang in it (see `member`).

Pure: no tasks, no clock, no clients. Owned by `Transactions`, its only caller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from milepost import types as t
from milepost.types import Transport
from milepost_router.record import EngineRecord

COLLECTIVE = (Transport.GLOO, Transport.NCCL)
"""Transports whose bytes reach all members at once, or hold up all of them."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A member: one life of one engine, and how many ranks it takes."""

    engine_id: str
    instance_id: str
    lives: int
    ranks: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """One process group.

    Attributes:
      name: under which its members and rank 0 meet.
      term: of the trainer that is rank 0.
      transport: gloo or nccl.
      master: where rank 0 listens.
      seats: its members, in order of their ranks.
    """

    name: str
    term: int
    transport: Transport
    master: tuple[str, int]
    seats: tuple[Seat, ...]

    def has(self, record: EngineRecord) -> bool:
        """Whether this life of an engine is a member."""
        return any(seat == _seat(record) for seat in self.seats)


class Groups:
    """The group of each run that the next transaction may use again."""

    def __init__(self) -> None:
        self._kept: dict[str, Group] = {}

    def take(
        self, request: t.PrepareRequest, records: Sequence[EngineRecord], *, name: str
    ) -> tuple[Group, Group | None]:
        """The group of a transaction, and the one it puts an end to, if any.

        Nothing is kept of the run until `keep`: whatever else becomes of the transaction gives the group up.

        Args:
          request: what the trainer wants.
          records: who takes part, in order of rank.
          name: of the group, where it must be a new one.
        """
        kept = self._kept.pop(request.run_id, None)
        wanted = Group(
            name=name,
            term=request.term,
            transport=request.transport,
            master=(request.master_address, request.master_port),
            seats=tuple(_seat(record) for record in records),
        )
        held = kept is not None and kept.name == request.group_name
        if kept is not None and held and dataclasses.replace(wanted, name=kept.name) == kept:
            return kept, None
        return wanted, kept

    def keep(self, run_id: str, group: Group) -> None:
        """All members of a group got their weights."""
        self._kept[run_id] = group


def _seat(record: EngineRecord) -> Seat:
    ranks = max(1, record.capabilities.tensor_parallel_size)
    return Seat(engine_id=record.engine_id, instance_id=record.instance_id, lives=record.lives, ranks=ranks)
