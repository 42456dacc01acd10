"""Calls that stream both ways: however one ends, nothing of it is left in the event loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import pytest

from milepost import RouterClient
from milepost.channel import NO_RETRY
from milepost.client import RolloutClient
from milepost.errors import MilepostError, Unavailable
from milepost.types import BucketHeader, Prompt
from milepost.v1 import rollout_pb2_grpc, router_pb2, router_pb2_grpc

DEADLINE_S = 30.0
BROKE_OFF = r"stops|broke while a message was sent"
"""The second where the status overtook the message that it answers: grpc.aio forgets it then."""


class BreaksOff(router_pb2_grpc.RouterServiceServicer, rollout_pb2_grpc.RolloutServiceServicer):
    """Takes the first message and ends the call; `silent`: takes all, and answers nothing."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent, self.taken, self.began = silent, 0, threading.Event()

    def UpdateWeights(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        for _ in request_iterator:
            self.taken += 1
            self.began.set()
            if not self.silent:
                yield router_pb2.UpdateWeightsResponse()
                context.abort(grpc.StatusCode.UNAVAILABLE, "the router stops")

    def Rollout(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        for _ in request_iterator:
            self.taken += 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "the gateway stops")
        yield from ()


@contextmanager
def serving(servicer: BreaksOff) -> Iterator[str]:
    """On threads of its own: every task of the event loop is the client's."""
    server = grpc.server(ThreadPoolExecutor(2))
    router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server)
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        assert server.stop(None).wait(DEADLINE_S)


@contextmanager
def nobody() -> Iterator[str]:
    """An address that is taken, so that nobody else listens there, and where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


class Waits:
    """Gives one message, then waits for ever; knows whether it was ended."""

    def __init__(self, message: Any) -> None:
        self._message, self.ended = message, False

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            yield self._message
            await asyncio.Event().wait()
        finally:
            self.ended = True


@asynccontextmanager
async def leaves_nothing() -> AsyncIterator[None]:
    """What is new in the loop ends by itself: grpc's own tasks of a call may outlast it by a moment."""
    before = asyncio.all_tasks()
    yield
    if new := asyncio.all_tasks() - before:
        _, left = await asyncio.wait(new, timeout=DEADLINE_S)
        assert not left


async def update(address: str, buckets: Any) -> None:
    async with RouterClient(address, retry=NO_RETRY) as router:
        async for _ in router.update_weights(buckets, timeout_s=DEADLINE_S):
            pass


async def rollout(address: str, prompts: Any) -> None:
    async with RolloutClient(address, retry=NO_RETRY) as gateway:
        async for _ in gateway.rollout(prompts, timeout_s=DEADLINE_S):
            pass


CALLS = [
    pytest.param(update, BucketHeader(transaction_id="t", fleet_epoch=1, bucket_index=0), id="weights"),
    pytest.param(rollout, Prompt(prompt_id="p", text="1+1="), id="rollouts"),
]


@pytest.mark.parametrize(("call", "message"), CALLS)
async def test_a_server_that_breaks_off(call: Any, message: Any) -> None:
    servicer, messages = BreaksOff(), Waits(message)
    with serving(servicer) as address:
        async with leaves_nothing():
            with pytest.raises(Unavailable, match=BROKE_OFF):
                await call(address, messages)
        assert servicer.taken == 1
        assert messages.ended


@pytest.mark.parametrize(("call", "message"), CALLS)
async def test_a_server_that_is_not_there(call: Any, message: Any) -> None:
    messages = Waits(message)
    with nobody() as address:
        async with leaves_nothing():
            with pytest.raises(Unavailable):
                await call(address, messages)


@pytest.mark.parametrize(("call", "message"), CALLS)
async def test_a_source_that_fails_is_heard(call: Any, message: Any) -> None:
    async def broken() -> AsyncIterator[Any]:
        raise ValueError("the file ends in mid-line")
        yield message

    with serving(BreaksOff()) as address:
        async with leaves_nothing():
            with pytest.raises(ValueError, match="mid-line"):
                await call(address, broken())


async def test_a_caller_that_is_cancelled() -> None:
    messages = Waits(BucketHeader(transaction_id="t", fleet_epoch=1, bucket_index=0))

    servicer = BreaksOff(silent=True)
    with serving(servicer) as address:
        async with leaves_nothing():
            calling = asyncio.create_task(update(address, messages))
            assert await asyncio.to_thread(servicer.began.wait, DEADLINE_S)
            calling.cancel()
            with pytest.raises((asyncio.CancelledError, MilepostError)):
                await calling
        assert messages.ended
