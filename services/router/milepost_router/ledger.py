"""The router's side of the ledger: who owns numbers and labels, and what to do while it is away.

The ledger owns versions, the engines own what they hold, the router owns nothing. What it does keep here:
- per run, the router term under which it may run weight transactions (a lease, renewed while one is open);
- the publications that the ledger has not heard of yet because it was away at the commit. Each is repeated
  in the background until the ledger takes it, also when a newer one overtakes it, for groups with its tokens
  can be sealed only then; or refuses it: then the engines that serve that number must not go on
  (`on_refused`).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from milepost.channel import RetryPolicy
from milepost.client import WeightClient
from milepost.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    MilepostError,
    NotFound,
    Unavailable,
)
from milepost.types import VersionState
from milepost_router.version_string import LoadedVersion

LEASE_TTL_S = 6.0
"""How long a router that was killed keeps another one from this run's transactions."""
_RELEASE_TTL_S = 0.001
_RELEASE_S = 1.0
_FIRST_DELAY_S, _MAX_DELAY_S = 0.2, 2.0
_AWAY = (Unavailable, DeadlineExceeded)

log = logging.getLogger(__name__)


class RouterHeld(Unavailable):
    """Another router runs this run's transactions, until its lease runs out."""

    default_reason = "ROUTER_HELD"


def _held_by_another(run_id: str, refusal: FailedPrecondition) -> RouterHeld:
    return RouterHeld(
        f"another router runs the weight transactions of run {run_id!r}: {refusal}; ask again when its lease "
        "has run out, or talk to that router",
        metadata=refusal.metadata,
        retry_after_s=LEASE_TTL_S / 2,
    )


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A version on its way into the ledger."""

    run_id: str
    term: int
    version: int
    label: int
    members: tuple[str, ...]
    allow_older_label: bool


class Ledger:
    """Weight versions of the buffer at `address`.

    Args:
      address: `host:port` of the buffer.
      timeout_s: deadline of one call.
      on_refused: called with (run, version, why) when a version that is served will never be published.
    """

    def __init__(
        self, address: str, *, timeout_s: float, on_refused: Callable[[str, int, str], None]
    ) -> None:
        self._client = WeightClient(address, timeout_s=timeout_s, retry=RetryPolicy(retry_for_s=1.0))
        self._on_refused = on_refused
        self._router_id = uuid.uuid4().hex
        self._router_terms: dict[str, int] = {}
        self._pending: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Stops repeating publications and gives the leases back."""
        tasks = list(self._pending)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for run_id in list(self._router_terms):
            await self._release(run_id)
        await self._client.close()

    async def _release(self, run_id: str) -> None:
        """Lets the next router have the run at once."""
        try:
            async with asyncio.timeout(_RELEASE_S):
                await self._lease(run_id, self._router_terms.pop(run_id), ttl_s=_RELEASE_TTL_S)
        except (MilepostError, TimeoutError) as error:
            log.info("run %s: lease not given back, it ends by itself: %s", run_id, error)

    async def lease(self, run_id: str) -> None:
        """Claims or renews the right to run this run's transactions.

        Raises:
          RouterHeld: another router holds it; wait until its lease runs out.
          Unavailable: the buffer does not answer.
        """
        held = self._router_terms.get(run_id, 0)
        try:
            term = await self._lease(run_id, held) if held else await self._claim(run_id)
        except FailedPrecondition:  # ours ran out
            del self._router_terms[run_id]
            term = await self._claim(run_id)
        self._router_terms[run_id] = term

    async def _claim(self, run_id: str) -> int:
        try:
            return await self._lease(run_id, 0)
        except FailedPrecondition as refusal:
            raise _held_by_another(run_id, refusal) from refusal

    async def _lease(self, run_id: str, held: int, *, ttl_s: float = LEASE_TTL_S) -> int:
        return await self._client.lease_router(
            run_id, router_id=self._router_id, router_term=held, ttl_s=ttl_s
        )

    async def reserve(self, run_id: str, *, term: int, step: int, attempt: int, at_least: int) -> int:
        """A number for the weights of `step`."""
        return await self._client.reserve_version(
            run_id, term=term, step=step, attempt=attempt, at_least=at_least
        )

    async def check_published(self, run_id: str, version: int, label: int) -> None:
        """The version is published with this label.

        Raises:
          FailedPrecondition: it is not.
        """
        known = await self._client.get_version(run_id, version=version)
        if known.state is not VersionState.PUBLISHED or known.label != label:
            raise FailedPrecondition(
                f"version = {version} is {known.state.name} with label {known.label} in the ledger, not "
                f"published with label {label}; prepare with version = 0 to reserve a new number"
            )

    async def publish(self, publication: Publication) -> bool:
        """Publishes a version; False while the ledger is away: then it is repeated in the background.

        Raises:
          MilepostError: the ledger refuses it (the term is stale, the number void).
        """
        try:
            await self._publish(publication)
        except _AWAY as error:
            log.warning("run %s: version %d is served but not published yet: %s", publication.run_id,
                        publication.version, error)  # fmt: skip
            task = asyncio.create_task(self._repeat(publication))
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)
            return False
        return True

    async def restate(self, publication: Publication) -> None:
        """Publishes a version that engines serve, if Redis has forgotten it.

        Raises:
          MilepostError: the ledger is away, or refuses it.
        """
        await self._publish(publication)

    async def judge(self, loaded: LoadedVersion, members: tuple[str, ...]) -> str:
        """May engines that hold these weights serve them? Empty: yes; else why not.

        A version that is reserved but not published was complete on its engines when a router died in its
        commit: the commit is finished here. The ledger refuses that for a term which is not the newest.
        """
        try:
            return await self._judge(loaded, members)
        except NotFound:
            return f"the ledger knows no version {loaded.version} of run {loaded.run_id}"
        except _AWAY as error:
            return f"its version {loaded} cannot be proven while the ledger is away: {error}"
        except MilepostError as error:
            return f"its version {loaded} is not admitted: {error}"

    async def _judge(self, loaded: LoadedVersion, members: tuple[str, ...]) -> str:
        known = await self._client.get_version(loaded.run_id, version=loaded.version)
        if known.label != loaded.label and known.state is VersionState.PUBLISHED:
            return f"its version {loaded} has label {known.label} in the ledger"
        if known.state is VersionState.RESERVED:
            await self._publish(
                Publication(
                    run_id=loaded.run_id,
                    term=known.term,
                    version=loaded.version,
                    label=loaded.label,
                    members=members,
                    allow_older_label=False,
                )
            )
            log.info("run %s: finished the commit of version %d", loaded.run_id, loaded.version)
        elif known.state is not VersionState.PUBLISHED:
            return f"its version {loaded} was given up before it was published"
        newest = await self._client.get_version(loaded.run_id)
        if newest.version != loaded.version:
            return f"its version {loaded} is not the newest one, which is {newest.version}"
        return ""

    async def _publish(self, publication: Publication) -> None:
        await self._client.publish_version(
            publication.run_id,
            term=publication.term,
            version=publication.version,
            label=publication.label,
            members=publication.members,
            allow_older_label=publication.allow_older_label,
        )

    async def _repeat(self, publication: Publication) -> None:
        delay_s = _FIRST_DELAY_S
        while True:
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_DELAY_S)
            try:
                await self._publish(publication)
            except _AWAY:
                continue
            except MilepostError as error:
                log.error("run %s: version %d is refused: %s", publication.run_id, publication.version, error)
                self._on_refused(publication.run_id, publication.version, str(error))
            else:
                log.info("run %s: version %d is published at last", publication.run_id, publication.version)
            return
