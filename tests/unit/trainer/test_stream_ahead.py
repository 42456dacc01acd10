"""The router's stream stands before the weights do, so that their one header goes out at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from milepost import types as t
from milepost.errors import Unavailable
from milepost.types import Prepared, Transport, WeightMember
from milepost_trainer.buckets import Bucket, plan_buckets
from milepost_trainer.transfer import Transfer
from milepost_trainer.transports.base import WeightTransport

WEIGHTS = {"a": torch.zeros(2), "b": torch.zeros(2)}
BUCKETS = plan_buckets([(name, "float32", (2,)) for name in WEIGHTS], bucket_bytes=1 << 20)
MEMBER = WeightMember(engine_id="e", instance_id="1", tensor_parallel_size=1, weight_hook="our.loader")
DEADLINE_S = 30.0


def prepared(name: str) -> Prepared:
    return Prepared(transaction_id=name, fleet_epoch=3, members=(MEMBER,))


class Router:
    """Notes each call, and each header with the call that it came by; a call can be broken off, or refuse."""

    def __init__(self) -> None:
        self.calls = 0
        self.standing: set[int] = set()
        self.headers: list[tuple[int, str]] = []
        self.commits: list[bool] = []
        self.changed = asyncio.Condition()
        self.breaks = asyncio.Event()
        self.refuses = False

    async def update_weights(self, headers: Any, *, timeout_s: float) -> AsyncIterator[t.BucketAck]:
        """The stream."""
        self.calls += 1
        number = self.calls
        await self._note(self.standing.add, number)
        breaking = asyncio.create_task(self.breaks.wait())
        try:
            while True:
                reading = asyncio.ensure_future(anext(headers))
                await asyncio.wait([reading, breaking], return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    reading.cancel()
                    raise Unavailable("it broke")
                self.headers.append((number, reading.result().transaction_id))
                self.commits.append(reading.result().commit)
                if self.refuses:
                    raise Unavailable("it broke")
                yield t.BucketAck(bucket_index=0, acks=(t.EngineAck(engine_id="e", ok=True),))
        except StopAsyncIteration:
            return
        finally:
            breaking.cancel()
            await self._note(self.standing.discard, number)

    async def _note(self, change: Any, number: int) -> None:
        async with self.changed:
            change(number)
            self.changed.notify_all()

    async def stand(self, *numbers: int) -> None:
        """Waits until just these calls stand."""
        async with asyncio.timeout(DEADLINE_S), self.changed:
            await self.changed.wait_for(lambda: self.standing == set(numbers))


class Sharing(WeightTransport):
    """Members copy from where the weights lie."""

    kind = Transport.CUDA_IPC

    def __init__(self, *, shared: bool = True) -> None:
        self._shared = shared

    async def open(self, prepared: Prepared, *, timeout_s: float) -> None:
        """Nothing."""

    async def stage(self, bucket: Bucket, flat: torch.Tensor) -> tuple[t.HandlesOfEngine, ...]:
        """Nothing to tell."""
        return ()

    def shares(self, prepared: Prepared) -> bool:
        """As the test has it."""
        return self._shared

    async def share(
        self, prepared: Prepared, manifest: Sequence[t.TensorSpec], weights: Mapping[str, torch.Tensor]
    ) -> tuple[t.HandlesOfEngine, ...]:
        """One order."""
        return (t.HandlesOfEngine(engine_id="e", handles=(b"order",), load_format="our.loader"),)

    async def close(self, *, broken: bool) -> None:
        """Nothing."""


def transfer(router: Any, *, shared: bool = True) -> Transfer:
    async def gather(bucket: Bucket) -> torch.Tensor:
        return torch.zeros(bucket.size_bytes, dtype=torch.uint8)

    async def whole() -> Mapping[str, torch.Tensor]:
        return WEIGHTS

    return Transfer(
        router, Sharing(shared=shared), buckets=BUCKETS, gather=gather, whole=whole, timeout_s=DEADLINE_S
    )


@pytest.fixture
def router() -> Router:
    return Router()


async def test_the_header_goes_out_by_the_stream_that_stood_before(router):
    sending = transfer(router)
    await sending.open_ahead(prepared("tx"))
    await router.stand(1)
    assert router.headers == []
    assert (await sending.run(prepared("tx")))[0] == 1
    await router.stand()
    assert (router.calls, router.headers) == (1, [(1, "tx")])
    assert router.commits == [True], "the commit goes with it"


@pytest.mark.parametrize("other", ["run", "open", "close"])
async def test_a_stream_that_nothing_is_sent_over_is_closed(router, other):
    sending = transfer(router)
    await sending.open_ahead(prepared("tx"))
    await router.stand(1)
    if other == "run":
        await sending.run(prepared("another"))
        assert router.headers == [(2, "another")]
    elif other == "open":
        await sending.open_ahead(prepared("another"))
        await router.stand(2)
    await sending.close_ahead()
    await router.stand()


async def test_a_stream_that_broke_meanwhile_is_replaced(router):
    sending = transfer(router)
    await sending.open_ahead(prepared("tx"))
    await router.stand(1)
    router.breaks.set()
    await router.stand()
    router.breaks.clear()
    await sending.run(prepared("tx"))
    assert router.headers == [(2, "tx")]


async def test_a_stream_that_breaks_with_its_header_fails_the_transfer(router):
    sending = transfer(router)
    await sending.open_ahead(prepared("tx"))
    await router.stand(1)
    router.refuses = True
    with pytest.raises(Unavailable, match="it broke"):
        await sending.run(prepared("tx"))
    await router.stand()
    assert router.calls == 1, "what became of the header is not known: the transaction is over"


async def test_buckets_have_a_stream_of_their_own(router):
    sending = transfer(router, shared=False)
    await sending.open_ahead(prepared("tx"))
    assert router.calls == 0
    assert (await sending.run(prepared("tx")))[0] == len(BUCKETS)
    assert router.calls == 1
