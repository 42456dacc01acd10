"""The run's ledger as the publisher sees it: patient calls, and restating after Redis forgot.

A call that meets an absent or slow buffer, or a full Redis, is asked again until it is answered: training
waits, nothing is lost, and the caller ends it by cancelling. `full` is set each time Redis refused for want
of memory: a checkpoint lets payloads go. When the Redis behind the buffer changes its identity, it may have
forgotten what it acknowledged; then the term and every step committed since the oldest kept checkpoint are
stated again before anything else happens. What is committed and what was stated live here; the loop owns the
rest.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from milepost import types as t
from milepost.client.buffer import BufferClient
from milepost.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    StaleTerm,
    Unavailable,
)
from milepost_trainer.checkpoint import manifest_since

log = logging.getLogger(__name__)

T = TypeVar("T")
_FIRST_DELAY_S, _MAX_DELAY_S = 0.2, 5.0
INLINE_BYTES = 8 * 1024 * 1024


class Ledger:
    """One publisher's account of one run.

    Args:
        client: of the buffer.
        run_id: the run.
        config: what the run is created with.
        on_payloads: gets each lease with the payloads that come along; None: none shall.
    """

    def __init__(
        self,
        client: BufferClient,
        *,
        run_id: str,
        config: t.RunConfig,
        on_payloads: Callable[[t.StepLease], None] | None = None,
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._config = config
        self._on_payloads = on_payloads
        self._redis = ""
        self._forgetful = False  # Redis forgot something since the last commit
        self.term = 0
        self.committed = 0
        self.checkpoint_wanted = False
        self.full = asyncio.Event()
        self.history: list[t.StepManifest] = []
        self.restated: t.ResumePoint | None = None
        """What Redis held when it was last restated; whoever acts on it takes it away."""

    async def create_run(self) -> t.Run:
        """Make the run, or read the one that is there."""
        try:
            return await self._patiently(lambda: self._client.create_run(self._run_id, config=self._config))
        except AlreadyExists as error:
            log.warning("%s; going on with the run as the ledger has it", error)
            return await self.read_run()

    async def read_run(self) -> t.Run:
        """The run as it is now."""
        return await self._patiently(lambda: self._client.get_run(self._run_id))

    async def read_stats(self) -> t.RunStats:
        """Counts of the run as they are now."""
        (stats,) = await self._patiently(lambda: self._client.get_stats(self._run_id))
        return stats

    async def open_term(self) -> t.ResumePoint:
        """Fence every older trainer of the run."""
        point = await self._patiently(lambda: self._client.resume_consumer(self._run_id))
        self.term = point.term
        self._redis = self._client.redis_run_id
        return point

    async def state_checkpoint(
        self, step: int, *, manifest: Sequence[t.StepManifest], on_gap: t.OnGap
    ) -> t.ResumePoint:
        """Say which checkpoint was loaded.

        Raises:
            DataLoss: payloads of the steps after it are gone and `on_gap` is fail.
        """
        self.history = list(manifest)
        self.committed = step
        return await self._patiently(
            lambda: self._client.resume_consumer(
                self._run_id, term=self.term, checkpoint_step=step, manifest=manifest, on_gap=on_gap
            )
        )

    async def lease(self, step: int, *, max_wait_s: float) -> t.StepLease:
        """Ask for a step until its groups are there.

        Raises:
            OutOfRange: nothing will ever come.
            StaleTerm: another trainer took over.
        """
        while True:
            lease = await self._mutate(
                lambda: self._client.lease_step(
                    self._run_id,
                    term=self.term,
                    step=step,
                    max_wait_s=max_wait_s,
                    inline_bytes=INLINE_BYTES if self._on_payloads else 0,
                )
            )
            self.checkpoint_wanted = lease.checkpoint_wanted
            if lease.groups:
                if self._on_payloads:
                    self._on_payloads(lease)
                return replace(lease, payloads=())
            if lease.pending is not None:
                log.debug("step %d: %s", step, lease.pending.reason)

    async def commit(self, entry: t.StepManifest) -> None:
        """Make a step's groups TRAINED; from here on it is history."""
        self.history.append(entry)
        try:
            result = await self._mutate(
                lambda: self._client.commit_step(
                    self._run_id,
                    term=self.term,
                    step=entry.step,
                    prompt_ids=entry.prompt_ids,
                    dropped=entry.dropped,
                ),
                committing=entry.step,
            )
        except BaseException:
            self.history.remove(entry)
            raise
        self.committed = entry.step
        self.checkpoint_wanted = result.checkpoint_wanted
        self._forgetful = False

    async def trim(self, oldest_kept: int) -> None:
        """Free payloads up to the oldest kept checkpoint."""
        await self._mutate(
            lambda: self._client.trim_checkpointed(self._run_id, term=self.term, step=oldest_kept)
        )
        self.history = list(manifest_since(self.history, oldest_kept=oldest_kept))

    # ------------------------------------------------------------------ restating

    async def _mutate(self, call: Callable[[], Awaitable[T]], *, committing: int | None = None) -> T:
        """Call; if Redis turns out to be another one, restate and call once more.

        Args:
            call: the mutation.
            committing: the step that it commits; it is then part of what is restated, and repeating is
                harmless.
        """
        try:
            result = await self._patiently(call)
        except (FailedPrecondition, NotFound) as error:
            if not await self._forgot(error):
                raise
            await self._restate(committing)
            return await self._patiently(call)
        if self._client.redis_run_id != self._redis:
            await self._restate(committing)
            return await self._patiently(call)
        return result

    async def _forgot(self, error: Exception) -> bool:
        """Whether a refusal comes from a Redis that forgot us, not from a trainer that replaced us."""
        try:
            run = await self.read_run()
        except NotFound:
            return True
        replaced = isinstance(error, StaleTerm) and run.term > self.term
        return not replaced and (self._forgetful or self._client.redis_run_id != self._redis)

    async def _restate(self, committing: int | None) -> None:
        step = self.committed if committing is None else committing
        manifest = [entry for entry in self.history if entry.step <= step]
        log.warning("Redis is another one than before: restating term %d and steps up to %d", self.term, step)
        await self.create_run()
        self.restated = await self._patiently(
            lambda: self._client.resume_consumer(
                self._run_id, term=self.term, checkpoint_step=step, manifest=manifest
            )
        )
        self._redis = self._client.redis_run_id
        self._forgetful = True

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        delay = _FIRST_DELAY_S
        while True:
            try:
                return await call()
            except (Unavailable, DeadlineExceeded) as error:
                log.warning("the buffer does not answer, asking again: %s", error)
            except ResourceExhausted as error:
                log.error("the ledger has no room, asking again: %s", error)
                self.full.set()
            await asyncio.sleep(delay)
            delay = min(2 * delay, _MAX_DELAY_S)
