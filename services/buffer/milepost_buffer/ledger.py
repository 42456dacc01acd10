"""The ledger: all that must survive a crash, behind plain async methods. State lives in Redis, none of it
here.

    prompt clients --put--> WAITING --lease--> ROLLING --seal--> READY --lease--> ASSIGNED --commit--> TRAINED
                               ^------- expired, released, stale -------'            ^---- resume ----'

Dataclasses in and out, errors of `milepost.errors`. Any number of ledgers, in any number of processes, may
share one Redis: every change is one call of `ledger.lua`, and every wait is woken through Redis.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from milepost_buffer.accounts import Accounts
from milepost_buffer.connection import CALL_TIMEOUT_S, RedisLink
from milepost_buffer.prompts import Prompts
from milepost_buffer.runs import Runs
from milepost_buffer.steps import Steps
from milepost_buffer.store import Clock, Store
from milepost_buffer.versions import Versions
from milepost_buffer.wake import Bell
from milepost_common.metrics import Instrument


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """One ledger; its parts share a connection pool and a subscription."""

    link: RedisLink
    store: Store
    bell: Bell
    runs: Runs
    prompts: Prompts
    steps: Steps
    versions: Versions
    accounts: Accounts

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """What its parts count."""
        prompts, store = self.prompts, self.store
        own = (prompts.seals, prompts.sealed_bytes, prompts.refused)
        return store.seconds, store.failures, self.bell.waited, *own


@asynccontextmanager
async def open_ledger(
    redis_url: str,
    *,
    redis_wait_s: float = 10.0,
    redis_timeout_s: float = CALL_TIMEOUT_S,
    require_aof: bool = True,
    clock: Clock | None = None,
) -> AsyncGenerator[Ledger]:
    """Connects to a Redis, checks that it may hold a ledger, and closes everything at the end.

    Args:
      redis_url: redis://, rediss:// or unix://.
      redis_wait_s: how long to wait for Redis to answer.
      redis_timeout_s: deadline of one call to it.
      require_aof: refuse a Redis without append-only file.
      clock: time in ms, for tests.

    Raises:
      Unavailable: Redis did not answer in time.
      FailedPrecondition: Redis would lose or evict the ledger; the message names the setting.
    """
    link = RedisLink(redis_url, timeout_s=redis_timeout_s)
    store, bell = Store(link, clock=clock), Bell(link)
    try:
        await link.wait_ready(wait_s=redis_wait_s)
        await link.check(require_aof=require_aof)
        await bell.start()
        yield Ledger(
            link=link,
            store=store,
            bell=bell,
            runs=Runs(store),
            prompts=Prompts(store, bell),
            steps=Steps(store, bell),
            versions=Versions(store, bell),
            accounts=Accounts(store),
        )
    finally:
        await bell.close()
        await link.close()
