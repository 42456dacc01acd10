"""The settle loop: tells the ledger what became of groups, in batches.

    groups --submit--> queue --(16 items, 12 MiB, or 20 ms)--> PutGroups, ReleasePrompts --> settled

| consumes            | produces           | waits for                        | who unblocks it              |
|---------------------|--------------------|----------------------------------|------------------------------|
| verdicts of groups  | sealed groups,     | the first item; then up to 20 ms | a group that is rolled out   |
|                     | released prompts   | the ledger, while it is away     | the ledger, or `stop`        |

An item stays here until the ledger has answered it, so that the renew loop
keeps its lease alive meanwhile: while the ledger is away nothing is thrown away. Everything that is sent may
be sent again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from milepost.errors import DeadlineExceeded, MilepostError, ResourceExhausted, Unavailable
from milepost.types import DropReason, Group, LeaseKey, ReleaseResult, SealResult, SealStatus
from milepost_rollout.backoff import Backoff, BackoffPolicy
from milepost_rollout.status import Counters
from milepost_rollout.verdict import Release

log = logging.getLogger(__name__)

MAX_ITEMS = 16
MAX_BYTES = 12 * 1024 * 1024
LINGER_S = 0.02
UNKNOWN_VERSION_S = 0.2
VERSION_WAIT_S = 60.0
_MAX_DETAIL = 2000


class Ledger(Protocol):
    """What is asked of the buffer here."""

    async def put_groups(self, run_id: str, *, groups: Sequence[Group]) -> tuple[SealResult, ...]:
        """Seals groups."""
        ...

    async def release_prompts(
        self,
        run_id: str,
        *,
        instance_id: str,
        leases: Iterable[LeaseKey],
        drop_reason: DropReason = ...,
        detail: str = ...,
        failed: bool = ...,
        exhausted_reason: DropReason = ...,
    ) -> ReleaseResult:
        """Gives leases back, or drops their prompts."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """One lease to settle: a group to seal, or a release."""

    key: LeaseKey
    group: Group | None = None
    release: Release | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes on the wire, roughly."""
        return len(self.group.payload) + 512 if self.group else 128


class Settler:
    """Owns the items that the ledger has not answered yet.

    Args:
      ledger: the buffer.
      run_id: the run.
      instance_id: holder of the leases.
      counters: told what became of each item.
      on_settled: called with the key of each item that is done with.
      version_wait_s: how long a group waits for the ledger to hear of its weight version. A router that died
        together with its engines may never say so: then the prompt is given back and rolled out again.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        run_id: str,
        instance_id: str,
        counters: Counters,
        on_settled: Callable[[LeaseKey], None],
        version_wait_s: float = VERSION_WAIT_S,
    ) -> None:
        self._ledger = ledger
        self._run_id = run_id
        self._instance_id = instance_id
        self._counters = counters
        self._on_settled = on_settled
        self._version_wait_s = version_wait_s
        self._unknown_since: dict[LeaseKey, float] = {}
        self._items: dict[LeaseKey, Item] = {}
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, item: Item) -> None:
        """Queues an item."""
        self._items[item.key] = item
        self._idle.clear()
        self._arrived.set()

    async def drained(self) -> None:
        """Waits until nothing is left to settle."""
        await self._idle.wait()

    async def run(self) -> None:
        """Settles until it is cancelled."""
        backoff = Backoff(BackoffPolicy())
        while True:
            await self._arrived.wait()
            if len(self._items) < MAX_ITEMS:
                await asyncio.sleep(LINGER_S)
            try:
                again = await self._settle_batch(self._next_batch())
            except (Unavailable, DeadlineExceeded, ResourceExhausted) as error:
                self._counters.ledger = f"ledger: {error}"
                await asyncio.sleep(backoff.next_s(asked_s=error.retry_after_s))
                continue
            self._counters.ledger = ""
            backoff.reset()
            if again:
                await asyncio.sleep(UNKNOWN_VERSION_S)

    def _next_batch(self) -> list[Item]:
        batch: list[Item] = []
        size = 0
        for item in self._items.values():
            size += item.size_bytes
            if batch and (len(batch) >= MAX_ITEMS or size > MAX_BYTES):
                break
            batch.append(item)
        return batch

    async def _settle_batch(self, batch: Sequence[Item]) -> bool:
        """Tells the ledger; returns whether an item must wait before it is told again."""
        again = await self._seal([i for i in batch if i.group is not None])
        releases: dict[Release, list[LeaseKey]] = defaultdict(list)
        for item in batch:
            if item.release is not None:
                releases[item.release].append(item.key)
        for release, keys in releases.items():
            await self._release(release, keys)
        if not self._items:
            self._arrived.clear()
            self._idle.set()
        return again

    async def _seal(self, items: Sequence[Item]) -> bool:
        groups = [i.group for i in items if i.group is not None]
        if not groups:
            return False
        try:
            results = await self._ledger.put_groups(self._run_id, groups=groups)
        except MilepostError as error:
            if _is_away(error):
                raise
            return self._refused_batch(items, error)
        again = False
        for item, result in zip(items, results, strict=True):
            again |= self._sealed(item, result)
        return again

    def _sealed(self, item: Item, result: SealResult) -> bool:
        """Takes the answer to one group; True: put it again."""
        if item.key not in self._items:
            return False
        if result.status is SealStatus.UNKNOWN_VERSION:
            return self._wait_for_version(item, result.message)
        if result.status is SealStatus.INVALID:
            log.error("prompt %r attempt %d: the ledger refuses the group: %s", *_names(item), result.message)
            self.submit(_give_up(item, result.message))
            return False
        if result.status is SealStatus.SEALED and item.group is not None:
            self._counters.sealed(item.group.header.rewards)
        elif result.status is not SealStatus.DUPLICATE:
            log.warning("prompt %r attempt %d: not sealed: %s", *_names(item), result.message)
        del self._items[item.key]
        self._settle(item.key, result.status.name.lower())
        return False

    def _wait_for_version(self, item: Item, message: str) -> bool:
        """Keeps the group for later, or gives its prompt back when that took too long."""
        now = asyncio.get_running_loop().time()
        if now - self._unknown_since.setdefault(item.key, now) < self._version_wait_s:
            self._items[item.key] = self._items.pop(item.key)  # to the back, so that others are not held up
            return True
        log.warning("prompt %r attempt %d: given back: %s", *_names(item), message)
        self.submit(Item(key=item.key, release=Release(detail=message)))
        return False

    def _refused_batch(self, items: Sequence[Item], error: MilepostError) -> bool:
        log.error("the ledger refuses %d groups: %s", len(items), error)
        for item in items:
            if item.key in self._items:
                self.submit(_give_up(item, str(error)))
        return False

    async def _release(self, release: Release, keys: Sequence[LeaseKey]) -> None:
        try:
            await self._ledger.release_prompts(
                self._run_id,
                instance_id=self._instance_id,
                leases=keys,
                drop_reason=release.drop_reason,
                detail=release.detail[:_MAX_DETAIL],
                failed=release.failed,
                exhausted_reason=release.exhausted_reason,
            )
        except MilepostError as error:  # the leases expire by themselves
            if _is_away(error):
                raise
            log.error("the ledger refuses to release %d prompts: %s", len(keys), error)
        for key in keys:
            if self._items.pop(key, None) is not None:
                self._settle(key, release.word)

    def _settle(self, key: LeaseKey, word: str) -> None:
        self._unknown_since.pop(key, None)
        self._counters.settled[word] += 1
        if not self._items:
            self._arrived.clear()
            self._idle.set()
        self._on_settled(key)


def _names(item: Item) -> tuple[str, int]:
    return item.key.prompt_id, item.key.attempt


def _is_away(error: MilepostError) -> bool:
    """The ledger cannot take anything now, whatever it is: away, or its Redis is full."""
    return isinstance(error, Unavailable | DeadlineExceeded) or error.reason == "REDIS_FULL"


def _give_up(item: Item, message: str) -> Item:
    release = Release(
        failed=True, exhausted_reason=DropReason.INVALID, detail=f"the ledger refused the group: {message}"
    )
    return Item(key=item.key, release=release)
