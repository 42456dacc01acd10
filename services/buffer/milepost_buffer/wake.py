"""Waiting without polling: a call that cannot be answered yet sleeps until some replica says that its run
changed.

    script --PUBLISH mp:{run}:wake "ps"--> Redis --> Bell (one subscription a process) --> the run's listeners

The letters are documented at the head of ledger.lua. A listener registers before it asks, so that a change
between asking and sleeping is not missed. Between a broken subscription and its repair, and against anything
unforeseen, listeners ask again every `FALLBACK_S`. A subscription is pinged every `QUIET_S`, and made anew if
that is not answered within as long. Owned by the process; listeners own nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import hiredis

from milepost_buffer.connection import CALL_ERRORS, RedisLink
from milepost_buffer.metrics import WAITED
from milepost_common.metrics import Counter

FALLBACK_S = 5.0
BLIND_FALLBACK_S = 0.5
RECONNECT_S = 0.5
QUIET_S = 5.0
_SUBSCRIBE = hiredis.pack_command(cast(Any, ("PSUBSCRIBE", "mp:*:wake")))
_PING = hiredis.pack_command(("PING",))
_CHANNEL = re.compile(rb"^mp:\{(.+)\}:wake$")

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What one attempt found.

    Attributes:
      value: what is answered if waiting ends here.
      done: waiting is over.
      next_change_s: when time alone may change the answer.
      waits: who waits and for what, as it is counted; empty: not counted.
    """

    value: T
    done: bool
    next_change_s: float | None = None
    waits: tuple[str, ...] = ()


class Bell:
    """Wakes this process's listeners when a run changes."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self.waited = Counter(WAITED)
        self._listeners: dict[str, set[tuple[frozenset[str], asyncio.Event]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._subscribed = False
        self._closing = False

    async def start(self) -> None:
        """Starts the subscription."""
        self._task = asyncio.create_task(self._serve(), name="wake")

    async def close(self) -> None:
        """Ends the subscription; waiting calls answer at once with what they have."""
        self._closing = True
        self._ring_all()
        task = self._task
        while task is not None and not task.done():
            task.cancel()  # again: a client library may swallow one that comes while it connects
            await asyncio.wait([task], timeout=0.1)

    async def wait_for(
        self, run_id: str, letters: str, ask: Callable[[], Awaitable[Answer[T]]], *, max_wait_s: float
    ) -> T:
        """Asks until the answer is done or `max_wait_s` have passed; returns the last value."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max_wait_s
        with self._listen(run_id, letters) as rung:
            while True:
                rung.clear()
                answer = await ask()
                left = deadline - loop.time()
                if answer.done or left <= 0 or self._closing:
                    return answer.value
                pause = min(left, FALLBACK_S if self._subscribed else BLIND_FALLBACK_S)
                if answer.next_change_s is not None:
                    pause = min(pause, answer.next_change_s + 0.001)
                began = loop.time()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(rung.wait(), pause)
                if answer.waits:
                    self.waited.add(*answer.waits, amount=loop.time() - began)

    def is_listening(self, run_id: str) -> bool:
        """True while the subscription stands and a call of this process waits for a change of the run."""
        return self._subscribed and run_id in self._listeners

    @contextlib.contextmanager
    def _listen(self, run_id: str, letters: str) -> Generator[asyncio.Event]:
        entry = (frozenset(letters), asyncio.Event())
        self._listeners.setdefault(run_id, set()).add(entry)
        try:
            yield entry[1]
        finally:
            self._listeners[run_id].discard(entry)
            if not self._listeners[run_id]:
                del self._listeners[run_id]

    def _ring(self, run_id: str, letters: str) -> None:
        for wanted, event in self._listeners.get(run_id, ()):
            if wanted.intersection(letters):
                event.set()

    def _ring_all(self) -> None:
        for entries in self._listeners.values():
            for _, event in entries:
                event.set()

    async def _serve(self) -> None:
        while not self._closing:
            try:
                await self._subscribe()
            except CALL_ERRORS as error:
                log.debug("wake subscription: %s", error)
            finally:
                self._subscribed = False
                self._ring_all()
            await asyncio.sleep(RECONNECT_S)

    async def _subscribe(self) -> None:
        wire = await self._link.open(timeout_s=QUIET_S, on_message=self._hear)
        try:
            [reply] = await wire.ask([_SUBSCRIBE], replies=1)
            if isinstance(reply, Exception):
                raise reply
            self._subscribed = True
            self._ring_all()
            while wire.is_open:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(wire.closed.wait(), QUIET_S)
                    return
                await wire.ask([_PING], replies=1)
        finally:
            wire.close()

    def _hear(self, channel: bytes, letters: bytes) -> None:
        if self._listeners and (found := _CHANNEL.match(channel)):
            self._ring(found[1].decode(), letters.decode())
