"""Checkpoints as the step loop needs them: save, read back, trim the ledger, delete what is too old.

    crew writes -> folder is finished -> oldest kept is read back -> ledger trims up to it -> older ones go

In this order: payloads are freed only for steps that a verified checkpoint contains, and folders are deleted
only by a trainer whose term the ledger has just accepted.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from milepost.types import SavedCheckpoint
from milepost_trainer.checkpoint import (
    BadCheckpointError,
    CheckpointMeta,
    CheckpointName,
    CheckpointStore,
    manifest_since,
)
from milepost_trainer.crew import Crew
from milepost_trainer.ledger import Ledger

log = logging.getLogger(__name__)


class Saver:
    """Saves the run's checkpoints.

    Args:
        store: the folder.
        crew: writes the state.
        ledger: knows term, history and what may be trimmed.
        world_size: ranks that write.
    """

    def __init__(self, store: CheckpointStore, *, crew: Crew, ledger: Ledger, world_size: int) -> None:
        self._store = store
        self._crew = crew
        self._ledger = ledger
        self._world_size = world_size

    async def newest(self) -> CheckpointMeta | None:
        """The newest checkpoint that reads back whole; damaged ones are reported and passed over."""
        meta, complaints = await asyncio.to_thread(self._store.newest_valid)
        for complaint in complaints:
            log.warning("checkpoint passed over: %s", complaint)
        return meta

    async def load(self, meta: CheckpointMeta) -> SavedCheckpoint:
        """Load a checkpoint on every rank."""
        path = self._store.path(meta.name)
        await self._crew.call("load", str(path / "state"))
        return SavedCheckpoint(step=meta.name.step, path=str(path))

    async def save_initial(self) -> SavedCheckpoint:
        """Save checkpoint 0, before anything is leased; the ledger has not heard of any yet."""
        return await self._write(0)

    async def save(self, step: int) -> SavedCheckpoint:
        """Save the current state as the checkpoint of `step`, and let go of what it makes superfluous.

        Raises:
            OSError: the disk refuses; nothing was trimmed or deleted.
        """
        saved = await self._write(step)
        await self._trim()
        return saved

    async def _write(self, step: int) -> SavedCheckpoint:
        name = CheckpointName(step, self._ledger.term)
        oldest = min((n.step for n in self._store.names()), default=step)
        meta = CheckpointMeta(
            name=name,
            run_id=self._store.run_id,
            manifest=manifest_since(self._ledger.history, oldest_kept=oldest),
            world_size=self._world_size,
        )
        state = await asyncio.to_thread(self._store.begin, name)
        await self._crew.call("save", str(state))
        path = await asyncio.to_thread(self._store.finish, meta)
        return SavedCheckpoint(step=step, path=str(path))

    async def _trim(self) -> None:
        kept = self._store.kept()
        try:
            await asyncio.to_thread(self._store.verify, kept[-1])
        except BadCheckpointError as error:
            log.error("nothing is trimmed, for the oldest kept checkpoint does not read back: %s", error)
            return
        await self._ledger.trim(kept[-1].step)
        await asyncio.to_thread(lambda: self._store.prune(term=self._ledger.term))


def export_dir(configured: str, checkpoints: str) -> Path:
    """Where the final Hugging Face export goes."""
    return Path(configured) if configured else Path(checkpoints) / "final"
