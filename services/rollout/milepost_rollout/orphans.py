"""Leases of this gateway that nobody works on: the ledger gave them, and its answer was lost on the way.

    the ledger names it --> SUSPECT --the calls that may have brought it have ended--> given back to the queue
                               |
                               +--a call brought it, or the ledger took it back--> nothing

Left alone they would expire, which keeps their room for that long and counts against `max_attempts` of a
prompt that has done nothing wrong. A lease that a call is bringing this very moment looks the same; so a
suspect is given back only once every call is over that was asked before the ledger named it. Until then it is
renewed.

A pure state machine: the gateway tells it of its calls and of what the ledger says; what is rolled out is the
gateway's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from milepost.types import LeaseKey


class Orphans:
    """Who may have been leased to nobody."""

    def __init__(self) -> None:
        self._asked = 0
        self._ended = 0
        self._suspects: dict[LeaseKey, int] = {}
        """A lease, and how many calls had been asked when the ledger named it."""

    @property
    def suspects(self) -> tuple[LeaseKey, ...]:
        """What is to be renewed until it is clear whose they are."""
        return tuple(self._suspects)

    def call_asked(self) -> None:
        """LeasePrompts is about to be sent; one call at a time."""
        self._asked += 1

    def call_ended(self) -> None:
        """It was answered and what it brought is worked on, or it failed."""
        self._ended = self._asked

    def named(self, keys: Iterable[LeaseKey]) -> None:
        """The ledger holds these leases for us, and our list did not have them."""
        for key in keys:
            self._suspects.setdefault(key, self._asked)

    def lost(self, keys: Iterable[LeaseKey]) -> None:
        """The ledger took these leases back."""
        for key in keys:
            self._suspects.pop(key, None)

    def take(self, ours: Collection[LeaseKey]) -> tuple[LeaseKey, ...]:
        """Takes out those that nobody will ever work on.

        Args:
          ours: leases that are worked on; they are no suspects any more.
        """
        self.lost([key for key in self._suspects if key in ours])
        found = tuple(key for key, asked in self._suspects.items() if self._ended >= asked)
        self.lost(found)
        return found
