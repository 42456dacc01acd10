"""Weight versions: numbers, labels, and who may run transactions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

from milepost import errors
from milepost import types as t
from milepost_buffer import checks
from milepost_buffer.store import Store
from milepost_buffer.wake import Answer, Bell

DEFAULT_ROUTER_TTL_S = 15.0
MAX_ROUTER_TTL_S = 60.0


class Versions:
    """What trainer and routers do to weight versions."""

    def __init__(self, store: Store, bell: Bell) -> None:
        self._store, self._bell = store, bell

    async def reserve(self, run_id: str, *, term: int, step: int, attempt: int, at_least: int = 0) -> int:
        """Reserves a number for the weights of `step`; the same arguments answer the same number."""
        checks.check_range("term", term, 1, checks.MAX_EXACT)
        checks.check_range("step", step, 0, checks.MAX_EXACT)
        checks.check_range("attempt", attempt, 1, checks.MAX_EXACT)
        checks.check_range("at_least", at_least, 0, checks.MAX_EXACT)
        return (await self._store.call(run_id, "reserve", term, step, attempt, max(1, at_least)))[0]

    async def publish(
        self,
        run_id: str,
        *,
        term: int,
        version: int,
        label: int,
        members: Sequence[str] = (),
        allow_older_label: bool = False,
    ) -> t.WeightVersion:
        """Publishes a reserved number. Idempotent.

        Raises:
          FailedPrecondition: burned, reserved for another label, or older than what is published.
        """
        checks.check_range("term", term, 1, checks.MAX_EXACT)
        checks.check_range("version", version, 1, checks.MAX_EXACT)
        checks.check_range("label", label, 0, checks.MAX_EXACT)
        packed = json.dumps(list(members))
        reply = await self._store.call(
            run_id, "publish", term, version, label, packed, int(allow_older_label)
        )
        return _version(reply[0])

    async def get(self, run_id: str, *, version: int = 0) -> t.WeightVersion:
        """One version, or the newest published one."""
        checks.check_range("version", version, 0, checks.MAX_EXACT)
        return _version((await self._store.call(run_id, "version", version))[0])

    async def watch(
        self, run_id: str, *, after_version: int = 0, max_wait_s: float = 60.0
    ) -> AsyncIterator[t.WeightVersion]:
        """The newest published version if it is above `after_version`, then each publication.

        Ends after a quiet `max_wait_s`. A reader that is slower than publication gets the newest and skips
        those before it.
        """
        await self._store.call(run_id, "rows")
        seen = after_version
        while True:

            async def ask(above: int = seen) -> Answer[t.WeightVersion | None]:
                newest = await self._newest(run_id)
                fresh = newest is not None and newest.version > above
                return Answer(newest if fresh else None, fresh)

            version = await self._bell.wait_for(run_id, "v", ask, max_wait_s=max_wait_s)
            if version is None:
                return
            yield version
            seen = version.version

    async def _newest(self, run_id: str) -> t.WeightVersion | None:
        try:
            return await self.get(run_id)
        except errors.NotFound:
            return None

    async def lease_router(
        self, run_id: str, *, router_id: str, router_term: int = 0, ttl_s: float | None = None
    ) -> int:
        """Claims or renews the right to run weight transactions; returns the router's term."""
        checks.check_name("router_id", router_id)
        checks.check_range("router_term", router_term, 0, checks.MAX_EXACT)
        ttl = DEFAULT_ROUTER_TTL_S if ttl_s is None else ttl_s
        checks.check_range("ttl", ttl, 0.001, MAX_ROUTER_TTL_S)
        return (await self._store.call(run_id, "router", router_id, router_term, round(ttl * 1000)))[0]


def _version(row: Sequence[Any]) -> t.WeightVersion:
    version, label, state, term, members, at_ms = row
    return t.WeightVersion(
        version=version,
        label=label,
        state=t.VersionState(state),
        term=term,
        members=tuple(json.loads(members)),
        published_at=datetime.fromtimestamp(at_ms / 1000, UTC) if at_ms else None,
    )
