"""What every client shares: one channel, a deadline on each call, retries, errors of our tree.

A client may be used as an async context manager, or closed with `await client.close()`. It holds no state
of the service it talks to, except `redis_run_id`: the identity of the Redis behind the last reply, so that
its owner can see it change and restate what it acted on.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from google.protobuf.duration_pb2 import Duration
from grpc.aio import AioRpcError, Channel, UsageError

from milepost import errors, tracing
from milepost.channel import DEFAULT_RETRY, REDIS_RUN_ID_KEY, RetryPolicy, open_channel
from milepost.status import from_rpc_error

DEFAULT_TIMEOUT_S = 10.0

T = TypeVar("T")


def duration(seconds: float | None) -> Duration | None:
    """A protobuf Duration of float seconds; None stays unset."""
    if seconds is None:
        return None
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


@asynccontextmanager
async def closing(source: AsyncIterable[T]) -> AsyncGenerator[AsyncIterator[T]]:
    """Iterates a source of somebody else's; a generator is closed, however that ends."""
    iterator = aiter(source)
    try:
        yield iterator
    finally:
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()


class ServiceClient:
    """Base of the clients.

    Args:
      address: `host:port` of the service.
      timeout_s: deadline of one attempt at a call, besides the time a call is asked to wait.
      retry: what to do about UNAVAILABLE.
      channel: an open channel to use instead of a new one; it is not closed with the client.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy = DEFAULT_RETRY,
        channel: Channel | None = None,
    ) -> None:
        self.address = address
        self.redis_run_id = ""
        self._timeout_s = timeout_s
        self._retry = retry
        self._owned = channel is None
        self._channel = channel or open_channel(address)

    async def close(self) -> None:
        """Closes the channel; calls that are under way are cancelled."""
        if self._owned:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(
        self, method: Any, request: Any, *, wait_s: float | None = None, timeout_s: float | None = None
    ) -> Any:
        """Calls a unary method with a deadline; repeats it while the service is unavailable."""
        deadline_s = (timeout_s or self._timeout_s) + (wait_s or 0.0)
        metadata = tracing.metadata()

        async def once() -> Any:
            call = method(request, timeout=deadline_s, metadata=metadata)
            reply = await call
            for key, value in await call.trailing_metadata():
                if key == REDIS_RUN_ID_KEY:
                    self.redis_run_id = str(value)
            return reply

        return await self._retrying(once)

    async def _retrying(self, once: Callable[[], Any]) -> Any:
        started = time.monotonic()
        delay = self._retry.first_delay_s
        while True:
            try:
                return await once()
            except AioRpcError as rpc_error:
                error = self._error(rpc_error)
                spent = time.monotonic() - started
                if not isinstance(error, errors.Unavailable) or spent >= self._retry.retry_for_s:
                    raise error from rpc_error
            await asyncio.sleep(random.uniform(0.5, 1.0) * delay)
            delay = min(2 * delay, self._retry.max_delay_s)

    async def _stream(
        self, method: Any, request: Any, *, timeout_s: float | None = None, quiet_s: float | None = None
    ) -> AsyncIterator[Any]:
        """Iterates over a server's stream; not retried, for the consumer knows where it stands.

        Args:
          method: of the stub.
          request: its request.
          timeout_s: deadline of the whole stream.
          quiet_s: longest time that the server may stay silent by the contract, for streams that may last for
            ever; to it comes the client's own deadline.

        Raises:
          DeadlineExceeded: one of the two passed.
        """
        call = method(request, timeout=timeout_s)
        messages = aiter(call)
        silence_s = None if quiet_s is None else quiet_s + self._timeout_s
        try:
            while True:
                async with asyncio.timeout(silence_s):
                    message = await anext(messages, None)
                if message is None:
                    return
                yield message
        except TimeoutError:
            raise errors.DeadlineExceeded(
                f"{self.address}: nothing came for {silence_s:g} s on a stream; is the service stuck?"
            ) from None
        except AioRpcError as rpc_error:
            raise self._error(rpc_error) from rpc_error
        finally:
            call.cancel()

    async def _exchange(
        self, method: Any, requests: AsyncGenerator[Any], *, timeout_s: float | None
    ) -> AsyncGenerator[Any]:
        """Streams requests in, and iterates over what comes back; never retried.

        What writes is a task of ours: gRPC's own is left behind, waiting for the next request or for a
        connection, when a call fails; and it keeps to itself what `requests` raises.
        """
        call = method(timeout=timeout_s, metadata=tracing.metadata())
        writing = asyncio.create_task(_write_all(call, requests), name="write requests")
        try:
            async for message in call:
                yield message
        except AioRpcError as rpc_error:
            raise self._error(rpc_error) from rpc_error
        except asyncio.CancelledError:
            if writing.done() and not writing.cancelled() and (error := writing.exception()):
                raise error from None
            raise
        finally:
            call.cancel()
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    def _error(self, rpc_error: AioRpcError) -> errors.MilepostError:
        """What a failed call means to its caller."""
        error = from_rpc_error(rpc_error)
        if (
            isinstance(error, errors.Unavailable | errors.DeadlineExceeded)
            and self.address not in error.message
        ):
            error.message = f"{self.address}: {error.message}"
        return error


async def _write_all(call: Any, requests: AsyncGenerator[Any]) -> None:
    """Writes until there is nothing more, or nobody who reads it; what `requests` raises ends the call."""
    try:
        async with aclosing(requests):
            async for request in requests:
                await call.write(request)
        await call.done_writing()
    except (AioRpcError, UsageError, asyncio.InvalidStateError):
        return  # whoever reads is told why
    except Exception:
        call.cancel()
        raise
