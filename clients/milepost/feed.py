"""Feeds a JSONL file into a run: resumes exactly, waits for credits, loses nothing.

    file --lines--> batch --PutPrompts(expected cursor)--> ledger
              ^                      |
              +------- cursor -------+   after a start, a lost reply, another feeder, or a Redis that forgot

The buffer owns the position: the cursor `<epoch>/<line>/<offset>` names the first line that is not in the
ledger yet and is stored together with the prompts before it, so that a feeder may die anywhere. This module
owns nothing but the batch in its hands.

| waits for             | until                                | told as                       |
|-----------------------|--------------------------------------|-------------------------------|
| the buffer, the run   | `wait_s` from the start              | "waiting for the buffer ..."  |
| a buffer that left    | `retry_s` without an answer          | "the buffer does not answer"  |
| credits               | `stall_s` without an accepted prompt | "waiting for credits"         |
| lines (`follow`)      | cancelled                            | "waiting for lines"           |
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from milepost import errors, tracing
from milepost.channel import NO_RETRY
from milepost.client.base import DEFAULT_TIMEOUT_S
from milepost.client.buffer import BufferClient
from milepost.jsonl import parse_line
from milepost.types import Prompt, PromptItem, PutPromptsResult

T = TypeVar("T")

MAX_BATCH = 1024
MAX_BATCH_BYTES = 4 * 1024 * 1024
_POLL_S = 0.5
_FIRST_DELAY_S, _MAX_DELAY_S = 0.1, 2.0


@dataclass(frozen=True, order=True)
class Cursor:
    """A position in a file that is read `epochs` times.

    Attributes:
      epoch: from 0.
      line: index of the next line, from 0.
      offset_bytes: where that line starts.
    """

    epoch: int = 0
    line: int = 0
    offset_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.epoch}/{self.line}/{self.offset_bytes}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Reads what the ledger stored; empty is the start.

        Raises:
          FailedPrecondition: somebody else's cursor.
        """
        if not text:
            return cls()
        parts = text.split("/")
        if len(parts) != 3 or not all(p.isdecimal() for p in parts):
            raise errors.FailedPrecondition(
                f"cursor = {text!r}: not written by a feeder of files; choose another source name"
            )
        return cls(*map(int, parts))


@dataclass(frozen=True, kw_only=True)
class FeedProgress:
    """How far a feed is.

    Attributes:
      accepted: prompts that this feeder put into the ledger, or found there.
      duplicates: those of them that were there already.
      skipped: lines that could not be used.
      position: the next line.
      size_bytes: of the file.
      waiting_for: in words; empty while it moves.
      finished: everything is in the ledger.
    """

    accepted: int = 0
    duplicates: int = 0
    skipped: int = 0
    position: Cursor = Cursor()
    size_bytes: int = 0
    waiting_for: str = ""
    finished: bool = False


@dataclass(frozen=True, kw_only=True)
class FeedOptions:
    """What to feed, and how patiently.

    Attributes:
      run_id: the run.
      source_id: name of the source; empty: the file's name. One source is one file: its cursor means nothing
        in another.
      dataset: first part of default ids; empty: the file's name without suffix.
      epochs: how often the file is fed. Ids that lines give themselves get `/<epoch>` appended from the
        second one on.
      batch: prompts a call, at most 1024.
      keep_open: leave the source open at the end, so that the run waits for more.
      follow: the file grows: wait at its end for more lines, for ever.
      wait_s: how long to wait at the start for the buffer and the run.
      retry_s: how long the buffer may not answer later on.
      stall_s: how long to wait for credits.
      credit_wait_s: what one call waits for credits, at most 60.
      timeout_s: deadline of one call, besides that wait.
    """

    run_id: str
    source_id: str = ""
    dataset: str = ""
    epochs: int = 1
    batch: int = 256
    keep_open: bool = False
    follow: bool = False
    wait_s: float = 300.0
    retry_s: float = 120.0
    stall_s: float = 86_400.0
    credit_wait_s: float = 5.0
    timeout_s: float = DEFAULT_TIMEOUT_S

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= MAX_BATCH:
            raise errors.InvalidArgument(f"batch = {self.batch}: wanted 1 to {MAX_BATCH}")
        if self.epochs < 1:
            raise errors.InvalidArgument(f"epochs = {self.epochs}: wanted at least 1")
        if self.follow and self.epochs != 1:
            raise errors.InvalidArgument(f"epochs = {self.epochs} with follow: a growing file has one epoch")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One line that is a prompt, and the position after it."""

    number: int
    prompt: Prompt
    after: Cursor
    size_bytes: int
    span: tracing.PromptSpan = tracing.NO_SPAN


class Feeder:
    """Feeds one file.

    Args:
      path: JSONL, one prompt a line (see `milepost.jsonl`).
      buffer: `host:port` of the buffer.
      options: see there.
      on_progress: told after each batch and when a wait starts.
      on_bad_line: told of each line that cannot be used: its number, and why.
      on_accepted: told the ids of each batch that the ledger accepted, in order.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        buffer: str,
        options: FeedOptions,
        on_progress: Callable[[FeedProgress], None] | None = None,
        on_bad_line: Callable[[int, errors.MilepostError], None] | None = None,
        on_accepted: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self._path = Path(path)
        self._options = options
        self._source_id = options.source_id or self._path.name
        self._dataset = options.dataset or self._path.stem
        self._client = BufferClient(buffer, retry=NO_RETRY, timeout_s=options.timeout_s)
        self._buffer = f"the buffer at {buffer}"
        self._on_progress, self._on_bad_line, self._on_accepted = on_progress, on_bad_line, on_accepted
        self._progress = FeedProgress()
        self._reported: set[int] = set()
        self._digest = ""
        self._redis_run_id = ""

    async def run(self) -> FeedProgress:
        """Feeds until everything is in the ledger and the source is closed.

        Raises:
          OSError: the file cannot be read.
          Unavailable, DeadlineExceeded: the buffer was away for too long.
          NotFound: the run did not come.
          FailedPrecondition: the source belongs to another content.
          ResourceExhausted: no credits came within `stall_s`.
        """
        if not self._options.follow:
            self._digest = await asyncio.to_thread(_digest, self._path)
        try:
            while not await self._feed_from(await self._open()):
                pass
        finally:
            await self._client.close()
        self._tell(waiting_for="", finished=True)
        return self._progress

    async def _feed_from(self, cursor: Cursor | None) -> bool:
        """Feeds from a position to the end; False when it must be read again. None: the source is closed."""
        if cursor is None:
            return True
        stored = str(cursor) if cursor != Cursor() else ""
        self._tell(position=cursor, size_bytes=self._path.stat().st_size)
        async for batch in self._batches(cursor):
            put = await self._put(batch, stored)
            if put is None or self._redis_changed():
                return False
            stored = put
        if not self._options.keep_open:
            await self._patiently(self._close)
        return not self._redis_changed()

    async def _close(self) -> int:
        return await self._client.close_source(self._options.run_id, source_id=self._source_id)

    # ------------------------------------------------------------------ position

    async def _open(self) -> Cursor | None:
        """Reads where the source stands; None when it is closed. Waits for the buffer and the run."""
        deadline = time.monotonic() + self._options.wait_s
        delay = _FIRST_DELAY_S
        while True:
            try:
                source = await self._client.open_source(
                    self._options.run_id, source_id=self._source_id, digest=self._digest
                )
                self._redis_run_id = self._client.redis_run_id
                return None if source.closed else Cursor.parse(source.cursor)
            except (errors.Unavailable, errors.DeadlineExceeded, errors.NotFound) as error:
                if time.monotonic() + delay > deadline:
                    error.message += f"; waited {self._options.wait_s:.0f} s"
                    raise
                missing = isinstance(error, errors.NotFound)
                whom = f"run {self._options.run_id}, which is not there yet" if missing else self._buffer
                self._tell(waiting_for=f"waiting for {whom}")
            await asyncio.sleep(delay)
            delay = min(2 * delay, _MAX_DELAY_S)

    def _redis_changed(self) -> bool:
        """True once after Redis was replaced: what it holds now may be older than what it said before."""
        before, self._redis_run_id = self._redis_run_id, self._client.redis_run_id
        return bool(before) and before != self._redis_run_id

    # ------------------------------------------------------------------ putting

    async def _put(self, batch: Sequence[_Entry], stored: str) -> str | None:
        """Puts a whole batch; returns the cursor now stored, or None when it has to be read again."""
        left = [self._traced(entry) for entry in batch]
        try:
            return await self._put_all(left, stored)
        finally:
            for entry in left:
                entry.span.end("not accepted")

    def _traced(self, entry: _Entry) -> _Entry:
        """The entry with a trace of its own, where traces are made."""
        span = tracing.begin("feed.put", run_id=self._options.run_id, prompt_id=entry.prompt.prompt_id)
        if not span.traceparent:
            return entry
        return replace(entry, prompt=replace(entry.prompt, traceparent=span.traceparent), span=span)

    async def _put_all(self, entries: Sequence[_Entry], stored: str) -> str | None:
        left = list(entries)
        while left:
            try:
                result = await self._offer(left, stored)
            except errors.FailedPrecondition:
                if await self._stands_at(stored):
                    raise
                return None
            except errors.NotFound:
                return None
            except (errors.InvalidArgument, errors.AlreadyExists) as error:
                stored, left = await self._single_out(left, stored, error)
                continue
            self._account(left[: result.accepted], result)
            left, stored = left[result.accepted :], result.cursor or stored
        return stored

    async def _stands_at(self, stored: str) -> bool:
        source = await self._patiently(self._reopen)
        return source == stored

    async def _reopen(self) -> str:
        source = await self._client.open_source(
            self._options.run_id, source_id=self._source_id, digest=self._digest
        )
        return source.cursor

    async def _offer(self, entries: Sequence[_Entry], stored: str) -> PutPromptsResult:
        """One PutPrompts, repeated until the buffer answers and has credits."""
        items = [PromptItem(prompt=e.prompt, cursor=str(e.after)) for e in entries]
        stalled_since = time.monotonic()

        async def put() -> PutPromptsResult:
            return await self._client.put_prompts(
                self._options.run_id,
                items=items,
                source_id=self._source_id,
                expected_cursor=stored,
                max_wait_s=self._options.credit_wait_s,
            )

        while True:
            try:
                result = await self._patiently(put)
                if result.accepted:
                    return result
                delay = _FIRST_DELAY_S
                self._tell(waiting_for="waiting for credits")
            except errors.ResourceExhausted as error:
                self._tell(waiting_for="waiting for credits")  # also of the wait that ends here
                if time.monotonic() - stalled_since > self._options.stall_s:
                    raise
                delay = min(max(error.retry_after_s or 0.0, 0.02), 5.0)
            await asyncio.sleep(delay)

    async def _single_out(
        self, entries: list[_Entry], stored: str, error: errors.MilepostError
    ) -> tuple[str, list[_Entry]]:
        """A batch was refused for what is in it: puts the entries one by one and skips the culprit."""
        if len(entries) == 1:
            self._skip(entries[0].number, error)
            return stored, []
        for i, entry in enumerate(entries):
            try:
                result = await self._offer([entry], stored)
            except (errors.InvalidArgument, errors.AlreadyExists) as found:
                self._skip(entry.number, found)
                return stored, entries[i + 1 :]
            self._account([entry], result)
            stored = result.cursor or stored
        return stored, []

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeats a call while the buffer does not answer, for `retry_s`."""
        started = time.monotonic()
        delay = _FIRST_DELAY_S
        while True:
            try:
                return await call()
            except (errors.Unavailable, errors.DeadlineExceeded) as error:
                if time.monotonic() + delay - started > self._options.retry_s:
                    error.message += f"; retried for {self._options.retry_s:.0f} s"
                    raise
                self._tell(waiting_for=f"{self._buffer} does not answer")
            await asyncio.sleep(delay)
            delay = min(2 * delay, _MAX_DELAY_S)

    # ------------------------------------------------------------------ reading

    async def _batches(self, start: Cursor) -> AsyncIterator[list[_Entry]]:
        """Prompts from a position on, in batches that fit into one message."""
        batch: list[_Entry] = []
        size_bytes = 0
        async for entry in self._entries(start):
            if entry is None:  # the end of a file that grows: hand over what there is
                if batch:
                    yield batch
                    batch, size_bytes = [], 0
                continue
            if batch and (
                len(batch) == self._options.batch or size_bytes + entry.size_bytes > MAX_BATCH_BYTES
            ):
                yield batch
                batch, size_bytes = [], 0
            batch.append(entry)
            size_bytes += entry.size_bytes
        if batch:
            yield batch

    async def _entries(self, start: Cursor) -> AsyncIterator[_Entry | None]:
        for epoch in range(start.epoch, self._options.epochs):
            at = start if epoch == start.epoch else Cursor(epoch=epoch)
            async for line, after in self._lines(at):
                entry = self._parse(line, after)
                if entry or not line:
                    yield entry

    async def _lines(self, at: Cursor) -> AsyncIterator[tuple[bytes, Cursor]]:
        """Lines from a position on, each with the position after it; an empty one before a wait."""
        with self._path.open("rb") as file:
            file.seek(at.offset_bytes)
            while True:
                line = file.readline()
                if self._options.follow and not line.endswith(b"\n"):
                    file.seek(at.offset_bytes)
                    yield b"", at
                    self._tell(waiting_for="waiting for lines")
                    await asyncio.sleep(_POLL_S)
                    continue
                if not line:
                    return
                at = Cursor(at.epoch, at.line + 1, at.offset_bytes + len(line))
                yield line, at

    def _parse(self, line: bytes, after: Cursor) -> _Entry | None:
        if not line.strip():
            return None
        default_id = f"{self._dataset}/{after.epoch}/{after.line - 1}"
        try:
            prompt = parse_line(line, number=after.line, default_id=default_id)
            if len(line) > MAX_BATCH_BYTES:
                raise errors.InvalidArgument(
                    f"line {after.line}: {len(line)} bytes; at most {MAX_BATCH_BYTES} travel, shorten it"
                )
        except errors.InvalidArgument as error:
            self._skip(after.line, error)
            return None
        if after.epoch and prompt.prompt_id != default_id:
            prompt = replace(prompt, prompt_id=f"{prompt.prompt_id}/{after.epoch}")
        return _Entry(number=after.line, prompt=prompt, after=after, size_bytes=len(line))

    # ------------------------------------------------------------------ telling

    def _skip(self, number: int, error: errors.MilepostError) -> None:
        if number not in self._reported:
            self._reported.add(number)
            self._tell(skipped=self._progress.skipped + 1)
            if self._on_bad_line:
                self._on_bad_line(number, error)

    def _account(self, entries: Sequence[_Entry], result: PutPromptsResult) -> None:
        if not entries:
            return
        for entry in entries:
            entry.span.end("accepted")
        if self._on_accepted:
            self._on_accepted([e.prompt.prompt_id for e in entries])
        self._tell(
            accepted=self._progress.accepted + len(entries),
            duplicates=self._progress.duplicates + result.duplicates,
            position=entries[-1].after,
            waiting_for="",
        )

    def _tell(self, **changes: object) -> None:
        self._progress = replace(self._progress, **changes)  # type: ignore[arg-type]  # fields by name
        if self._on_progress:
            self._on_progress(self._progress)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
