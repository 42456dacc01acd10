"""Gets the bytes of one prepared transaction to its members, by one stream of headers and acknowledgements.

    whole     every member copies the weights from where they lie: one header, one acknowledgement
    pushed    one header tells of all buckets, which members take as they are sent; one acknowledgement
    buckets   stage ──> header goes out ──> send ──> acks come in ──> unstage, the next one gathered meanwhile

One header takes the commit along: its acknowledgement says what became of that. Between two transactions this
owns nothing but the stream of one that was prepared ahead: that is open before the weights are there, so that
their header goes out at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import torch

from milepost import types as t
from milepost.client.router import RouterClient
from milepost.errors import FailedPrecondition, Unavailable
from milepost_trainer.buckets import Bucket
from milepost_trainer.transports.base import WeightTransport

Gather = Callable[[Bucket], Awaitable[torch.Tensor]]
Whole = Callable[[], Awaitable[Mapping[str, torch.Tensor]]]


class Transfer:
    """The transfer of one model's weights.

    Args:
        router: takes the headers.
        transport: moves the bytes.
        buckets: of the model.
        gather: brings a bucket's bytes to this rank.
        whole: brings all weights to this rank, by name, where they stay; None: buckets alone are sent.
        timeout_s: of a transaction.
    """

    def __init__(
        self,
        router: RouterClient,
        transport: WeightTransport,
        *,
        buckets: Sequence[Bucket],
        gather: Gather,
        whole: Whole | None,
        timeout_s: float,
    ) -> None:
        self._router, self._transport = router, transport
        self._buckets, self._gather, self._whole = tuple(buckets), gather, whole
        self._timeout_s = timeout_s
        self._ahead: tuple[str, _Stream] | None = None
        self.manifest = tuple(spec for bucket in self._buckets for spec in _specs(bucket))
        self.size_bytes = sum(bucket.size_bytes for bucket in self._buckets)

    async def open_ahead(self, prepared: t.Prepared) -> None:
        """Open the stream of a transaction whose weights are still made, where it will be one header."""
        await self.close_ahead()
        shares = self._whole is not None and self._transport.shares(prepared)
        if shares or self._transport.announces(prepared):
            self._ahead = prepared.transaction_id, _Stream(self._router, timeout_s=self._timeout_s)

    async def close_ahead(self) -> None:
        """Let go of a stream that nothing was sent over."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            await ahead[1].close()

    async def run(self, prepared: t.Prepared) -> tuple[int, t.Committed | None]:
        """Sends everything; returns the number of buckets that the commit must name, and what became of it
        where it went with them.
        """
        if self._whole is not None and self._transport.shares(prepared):
            return 1, await self._share(prepared, await self._whole())
        if self._transport.announces(prepared):
            return 1, await self._push(prepared)
        await self._send_buckets(prepared)
        await self._transport.flush(timeout_s=self._timeout_s)
        return len(self._buckets), None

    async def _share(self, prepared: t.Prepared, weights: Mapping[str, torch.Tensor]) -> t.Committed | None:
        header = self._only_header(prepared, await self._transport.share(prepared, self.manifest, weights))
        async with self._stream(prepared.transaction_id) as stream:
            stream.put(header)
            ack = await stream.next()
            self._transport.taken({each.engine_id for each in ack.acks if each.ok})
            _check_ack(ack)
            return ack.committed

    async def _push(self, prepared: t.Prepared) -> t.Committed | None:
        handles = self._transport.announce(prepared, self._buckets, timeout_s=self._timeout_s)
        header = self._only_header(prepared, handles)
        async with self._stream(prepared.transaction_id) as stream:
            stream.put(header)
            ack = await _both(self._send_all(), _accepted(stream))
        self._transport.taken({member.engine_id for member in prepared.members})
        return ack.committed

    def _only_header(self, prepared: t.Prepared, handles: tuple[t.HandlesOfEngine, ...]) -> t.BucketHeader:
        """It stands for all weights, and takes the commit along."""
        return t.BucketHeader(
            transaction_id=prepared.transaction_id,
            fleet_epoch=prepared.fleet_epoch,
            bucket_index=0,
            handles=handles,
            size_bytes=self.size_bytes,
            whole=True,
            commit=True,
        )

    async def _send_all(self) -> None:
        """Send bucket after bucket, gathering the next one while one is on its way; all are through then."""
        gathering = self._start_gather(0)
        try:
            for index, bucket in enumerate(self._buckets):
                flat = await gathering
                if index + 1 < len(self._buckets):
                    gathering = self._start_gather(index + 1)
                await self._transport.stage(bucket, flat)
                await self._transport.send(bucket, flat, timeout_s=self._timeout_s)
                await self._transport.unstage(bucket)
            await self._transport.flush(timeout_s=self._timeout_s)
        finally:
            gathering.cancel()

    async def _send_buckets(self, prepared: t.Prepared) -> None:
        """Send all buckets, gathering the next one while one is on its way."""
        gathering = self._start_gather(0)
        try:
            async with self._stream() as stream:
                for index, bucket in enumerate(self._buckets):
                    flat = await gathering
                    if index + 1 < len(self._buckets):
                        gathering = self._start_gather(index + 1)
                    handles = await self._transport.stage(bucket, flat)
                    stream.put(_header(prepared, bucket, handles))
                    await self._exchange(bucket, flat, stream)
                    await self._transport.unstage(bucket)
        finally:
            gathering.cancel()

    @asynccontextmanager
    async def _stream(self, transaction_id: str = "") -> AsyncGenerator[_Stream]:
        """The router's stream: the one that was opened ahead for a transaction, or a new one."""
        ahead = self._ahead
        if ahead is not None and ahead[0] == transaction_id and ahead[1].stands:
            self._ahead, stream = None, ahead[1]
        else:
            await self.close_ahead()
            stream = _Stream(self._router, timeout_s=self._timeout_s)
        try:
            yield stream
        finally:
            await stream.close()

    async def _exchange(self, bucket: Bucket, flat: torch.Tensor, stream: _Stream) -> None:
        """Push a bucket's bytes and hear what the members say."""
        await _both(self._transport.send(bucket, flat, timeout_s=self._timeout_s), _accepted(stream))

    def _start_gather(self, index: int) -> asyncio.Task[torch.Tensor]:
        async def gather() -> torch.Tensor:
            return await self._gather(self._buckets[index])

        return asyncio.create_task(gather(), name=f"gather bucket {index}")


class _Stream:
    """Headers into the router, acknowledgements out of it; the call stands from the start.

    Args:
        router: takes the headers.
        timeout_s: of all of it.
    """

    def __init__(self, router: RouterClient, *, timeout_s: float) -> None:
        self._headers: asyncio.Queue[t.BucketHeader | None] = asyncio.Queue()
        acks = router.update_weights(_drain(self._headers), timeout_s=timeout_s)
        self._acks = cast(AsyncGenerator[t.BucketAck], acks)
        self._first: asyncio.Task[t.BucketAck] | None = asyncio.create_task(self._next(), name="first ack")

    @property
    def stands(self) -> bool:
        """Nothing has ended it before its first header."""
        return self._first is not None and not self._first.done()

    def put(self, header: t.BucketHeader) -> None:
        """Send a header."""
        self._headers.put_nowait(header)

    async def next(self) -> t.BucketAck:
        """The next acknowledgement.

        Raises:
            Unavailable: the router ended the transfer.
        """
        first, self._first = self._first, None
        return await (self._next() if first is None else first)

    async def _next(self) -> t.BucketAck:
        try:
            return await anext(self._acks)
        except StopAsyncIteration:
            raise Unavailable("the router ended the transfer early") from None

    async def close(self) -> None:
        """End the call, however far it came."""
        self._headers.put_nowait(None)  # also where it failed: the call's own task waits for the next header
        first, self._first = self._first, None
        if first is not None:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        await self._acks.aclose()


async def _both(
    sending: Coroutine[Any, Any, None], answering: Coroutine[Any, Any, t.BucketAck]
) -> t.BucketAck:
    """Do both, and return the answer; whichever fails first ends both."""
    answered = asyncio.create_task(answering, name="await acks")
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(sending, name="send bytes"), answered]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        return answered.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drain(headers: asyncio.Queue[t.BucketHeader | None]) -> AsyncIterator[t.BucketHeader]:
    while (header := await headers.get()) is not None:
        yield header


async def _accepted(stream: _Stream) -> t.BucketAck:
    """Hear of one bucket; raises at once where it was not taken, whoever still waits to send it."""
    ack = await stream.next()
    _check_ack(ack)
    return ack


def _check_ack(ack: t.BucketAck) -> None:
    """Raise unless somebody took the bucket and the group still stands."""
    refusals = "; ".join(f"{a.engine_id}: {a.message}" for a in ack.acks if not a.ok)
    if ack.group_broken:
        raise Unavailable(f"bucket {ack.bucket_index}: the group broke: {refusals}")
    if not any(a.ok for a in ack.acks):
        raise FailedPrecondition(f"bucket {ack.bucket_index}: no member took it: {refusals}")


def _header(prepared: t.Prepared, bucket: Bucket, handles: tuple[t.HandlesOfEngine, ...]) -> t.BucketHeader:
    return t.BucketHeader(
        transaction_id=prepared.transaction_id,
        fleet_epoch=prepared.fleet_epoch,
        bucket_index=bucket.index,
        tensors=_specs(bucket),
        handles=handles,
        size_bytes=bucket.size_bytes,
    )


def _specs(bucket: Bucket) -> tuple[t.TensorSpec, ...]:
    return tuple(t.TensorSpec(name=s.name, dtype=s.dtype, shape=s.shape) for s in bucket.slots)
