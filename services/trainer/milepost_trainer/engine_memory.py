"""GPU memory that engines lend to the trainer beside them while a step trains (`publish.release_memory`).

    async with memory.lent(term):     released ... the step trains ... resumed; engines need weights then

The router drives the engines and keeps the lease, so that a trainer that dies here takes nothing along. A
fleet that does not lend holds no step up: it is trained with the memory there is. A router that cannot be
told to give it back is told again (`owed`): until then, or until the lease ends, nothing is generated.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from milepost import types as t
from milepost.client.router import RouterClient
from milepost.errors import MilepostError, StaleTerm
from milepost_trainer.settings import PublishSettings

log = logging.getLogger(__name__)


class EngineMemory:
    """The trainer's side of the lease.

    Args:
        router: control of the fleet.
        settings: what is lent, and for how long.
        run_id: whose engines.

    Attributes:
        owed: the router has not heard yet that engines get their memory back.
    """

    def __init__(self, router: RouterClient, settings: PublishSettings, *, run_id: str) -> None:
        self._router, self._settings, self._run_id = router, settings, run_id
        self.owed = False

    @asynccontextmanager
    async def lent(self, term: int) -> AsyncGenerator[None]:
        """Engines lend their memory for the block, as far as they do.

        Raises:
            StaleTerm: another trainer took over.
        """
        if not self._settings.release_memory:
            yield
            return
        await self._borrow(term)
        try:
            yield
        finally:
            await self.give_back(term)

    async def _borrow(self, term: int) -> None:
        settings = self._settings
        try:
            change = await self._router.release_memory(
                self._run_id,
                term=term,
                tags=settings.release_memory,
                drain_s=settings.memory_drain_s,
                lease_s=settings.memory_lease_s,
            )
        except StaleTerm:
            raise
        except MilepostError as error:
            log.warning("engines keep their memory in this step: %s", error)
        else:
            _tell(change, "keeps its memory")

    async def give_back(self, term: int) -> None:
        """What an earlier step or trainer borrowed goes back.

        Raises:
            StaleTerm: another trainer took over.
        """
        if not self._settings.release_memory:
            return
        try:
            change = await self._router.resume_memory(self._run_id, term=term)
        except StaleTerm:
            raise
        except MilepostError as error:
            self.owed = True
            log.warning("engines do not get their memory back yet: %s", error)
        else:
            self.owed = False
            _tell(change, "does not take its memory back")


def _tell(change: t.MemoryChange, what: str) -> None:
    for engine_id, why in change.failed.items():
        log.warning("engine %s %s: %s", engine_id, what, why)
