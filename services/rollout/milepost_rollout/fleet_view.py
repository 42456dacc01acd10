"""What the gateway knows of the fleet: the context length that every engine takes."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from milepost.errors import MilepostError
from milepost.types import Fleet

log = logging.getLogger(__name__)

UNKNOWN_S = 1.0
KNOWN_S = 15.0


class FleetSource(Protocol):
    """What is asked of the router; `milepost.client.RouterClient` is one."""

    async def list_engines(self, run_id: str = "") -> Fleet:
        """The engines."""
        ...


class FleetView:
    """Asks the router for its engines from time to time.

    Attributes:
      context_length: the shortest among the engines' contexts, in tokens; 0 while it is unknown.
    """

    def __init__(self, source: FleetSource, *, run_id: str) -> None:
        self._source = source
        self._run_id = run_id
        self.context_length = 0

    async def run(self) -> None:
        """Asks until it is cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(KNOWN_S if self.context_length else UNKNOWN_S)

    async def refresh(self) -> None:
        """Asks once; keeps what it knew when there is no answer."""
        try:
            fleet = await self._source.list_engines(self._run_id)
        except MilepostError as error:
            log.debug("cannot list engines: %s", error)
            return
        known = [e.capabilities.context_length for e in fleet.engines if e.capabilities]
        self.context_length = min((n for n in known if n), default=self.context_length)
