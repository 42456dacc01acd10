"""One transaction's bytes, where members are told once of all buckets: what goes out, and when."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pickle
from base64 import b64decode
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

import pytest
import torch

from milepost import types as t
from milepost.errors import FailedPrecondition, Unavailable
from milepost.types import Prepared, Transport, WeightMember
from milepost_trainer.buckets import Bucket, plan_buckets
from milepost_trainer.transfer import Transfer
from milepost_trainer.transports.base import WeightTransport
from milepost_trainer.transports.nccl import NcclTransport

BUCKETS = plan_buckets([(name, "float32", (2,)) for name in "abc"], bucket_bytes=8)
MEMBERS = tuple(
    WeightMember(engine_id=name, instance_id=f"{name}1", tensor_parallel_size=2, weight_hook="our.loader")
    for name in ("e1", "e2")
)
PREPARED = Prepared(transaction_id="tx", fleet_epoch=3, members=MEMBERS, group_name="group", world_size=5)
DEADLINE_S = 30.0


class Router:
    """Takes headers, and acknowledges them when it is let."""

    def __init__(self, ack: t.BucketAck) -> None:
        self.ack, self.let = ack, asyncio.Event()
        self.headers: list[t.BucketHeader] = []
        self.streams = 0
        self.opened = asyncio.Event()

    async def update_weights(self, headers: Any, *, timeout_s: float) -> AsyncIterator[t.BucketAck]:
        """The stream."""
        self.streams += 1
        self.opened.set()
        async for header in headers:
            self.headers.append(header)
            await self.let.wait()
            yield self.ack


class Pushing(WeightTransport):
    """Sends to nobody; says what it was asked for, and when it has reached a bucket, where it may hang."""

    kind = Transport.NCCL

    def __init__(self, events: list[str], *, until: int, hangs: bool = False) -> None:
        self._events, self._until, self._hangs = events, until, hangs
        self.reached = asyncio.Event()
        self.took: set[str] = set()

    async def open(self, prepared: Prepared, *, timeout_s: float) -> None:
        """Nothing."""

    async def stage(self, bucket: Bucket, flat: torch.Tensor) -> tuple[t.HandlesOfEngine, ...]:
        """Nothing to tell."""
        self._events.append(f"stage {bucket.index}")
        return ()

    async def send(self, bucket: Bucket, flat: torch.Tensor, *, timeout_s: float) -> None:
        """Lets others run."""
        await asyncio.sleep(0)
        self._events.append(f"send {bucket.index}")
        if bucket.index == self._until:
            self.reached.set()
            await (asyncio.Event() if self._hangs else self.reached).wait()

    async def flush(self, *, timeout_s: float) -> None:
        """The end of all."""
        self._events.append("flush")

    def announces(self, prepared: Prepared) -> bool:
        """Always."""
        return True

    def announce(
        self, prepared: Prepared, buckets: Sequence[Bucket], *, timeout_s: float
    ) -> tuple[t.HandlesOfEngine, ...]:
        """One order for all."""
        return (t.HandlesOfEngine(handles=(b"order",), load_format="our.loader"),)

    def taken(self, engine_ids: Collection[str]) -> None:
        """Who has it."""
        self.took = set(engine_ids)

    async def close(self, *, broken: bool) -> None:
        """Nothing."""


def transfer(router: Any, transport: WeightTransport, events: list[str]) -> Transfer:
    async def gather(bucket: Bucket) -> torch.Tensor:
        events.append(f"gather {bucket.index}")
        return torch.zeros(bucket.size_bytes, dtype=torch.uint8)

    return Transfer(router, transport, buckets=BUCKETS, gather=gather, whole=None, timeout_s=DEADLINE_S)


def acknowledged(**changes: Any) -> t.BucketAck:
    acks = tuple(t.EngineAck(engine_id=m.engine_id, ok=True) for m in MEMBERS)
    return t.BucketAck(**({"bucket_index": 0, "acks": acks} | changes))


async def test_one_header_goes_out_before_the_buckets_and_one_answer_comes_after_them() -> None:
    events: list[str] = []
    committed = t.Committed(version=4, serving=("e1", "e2"))
    router, transport = Router(acknowledged(committed=committed)), Pushing(events, until=2)
    running = asyncio.create_task(transfer(router, transport, events).run(PREPARED))
    async with asyncio.timeout(DEADLINE_S):
        await transport.reached.wait()
        assert not running.done(), "it waits for the members' answer"
        router.let.set()
        assert await running == (1, committed), "the commit goes with the only header"
    [header] = router.headers
    assert (header.whole, header.commit, header.bucket_index, header.tensors) == (True, True, 0, ())
    assert header.size_bytes == sum(b.size_bytes for b in BUCKETS)
    assert events.index("gather 1") < events.index("send 0"), "the next one is gathered meanwhile"
    assert [e for e in events if e.startswith("send")] == ["send 0", "send 1", "send 2"]
    assert events[-1] == "flush"
    assert transport.took == {"e1", "e2"}


@pytest.mark.parametrize("transaction", ["tx", "another"])
async def test_the_stream_of_what_was_prepared_ahead_stands_before_the_weights_do(transaction) -> None:
    events: list[str] = []
    router = Router(acknowledged())
    router.let.set()
    sending = transfer(router, Pushing(events, until=0), events)
    async with asyncio.timeout(DEADLINE_S):
        await sending.open_ahead(dataclasses.replace(PREPARED, transaction_id=transaction))
        await router.opened.wait()
        assert router.headers == []
        await sending.run(PREPARED)
    assert [header.transaction_id for header in router.headers] == ["tx"]
    assert router.streams == (1 if transaction == "tx" else 2), "each transaction has its own"


async def test_an_acknowledgement_does_not_end_a_push_whose_bytes_are_not_through() -> None:
    events: list[str] = []
    router = Router(acknowledged())
    router.let.set()
    transport = Pushing(events, until=1, hangs=True)
    running = asyncio.create_task(transfer(router, transport, events).run(PREPARED))
    async with asyncio.timeout(DEADLINE_S):
        await transport.reached.wait()
        await asyncio.wait([running], timeout=0.05)
        assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert "flush" not in events


async def test_members_that_fail_end_a_broadcast_that_would_wait_for_them() -> None:
    events: list[str] = []
    bad = (t.EngineAck(engine_id="e1", message="it is gone"), t.EngineAck(engine_id="e2", message="waits"))
    router = Router(acknowledged(acks=bad, group_broken=True))
    transport = Pushing(events, until=1, hangs=True)
    running = asyncio.create_task(transfer(router, transport, events).run(PREPARED))
    async with asyncio.timeout(DEADLINE_S):
        await transport.reached.wait()
        router.let.set()
        with pytest.raises(Unavailable, match="the group broke: e1: it is gone; e2: waits"):
            await running
    assert "flush" not in events
    assert transport.took == set()


# ---- NCCL's orders -----------------------------------------------------------------------------------------


def orders(transport: NcclTransport) -> dict[str, dict[str, Any]]:
    """What each engine is told."""
    told = transport.announce(PREPARED, BUCKETS, timeout_s=7.0)
    assert all(h.load_format == "our.loader" and len(h.handles) == 1 for h in told)
    return {h.engine_id: json.loads(pickle.loads(b64decode(h.handles[0]))[0][0]) for h in told}


async def test_an_engine_is_told_the_layout_once_in_each_of_its_lives() -> None:
    transport = NcclTransport(master_address="127.0.0.1")
    transport._members = MEMBERS  # `open` wants a GPU
    first = orders(transport)
    assert first["e1"]["pushed"]["group"] == "group"
    assert first["e1"]["pushed"]["timeout_s"] == 7.0
    assert [size for size, _ in first["e1"]["pushed"]["buckets"]] == [b.size_bytes for b in BUCKETS]
    transport.taken({"e1"})
    second = orders(transport)
    assert "buckets" not in second["e1"]["pushed"]
    assert "buckets" in second["e2"]["pushed"]
    assert second["e1"]["layout"] == first["e1"]["layout"] == second["e2"]["layout"]
    await transport.close(broken=True)
    assert "buckets" in orders(transport)["e1"]["pushed"], "nobody knows what a broken transfer left"


async def test_buckets_go_one_by_one_where_a_member_has_not_our_loader() -> None:
    transport = NcclTransport(master_address="127.0.0.1")
    assert transport.announces(PREPARED)
    bare = WeightMember(engine_id="bare")
    assert not transport.announces(Prepared(members=(*MEMBERS, bare)))
    assert not transport.announces(Prepared())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
async def test_nccl_says_what_to_do_where_there_is_no_gpu() -> None:
    transport = NcclTransport(master_address="127.0.0.1")
    with pytest.raises(FailedPrecondition, match=r"trainer\.device to cuda, or choose another transport"):
        await transport.open(PREPARED, timeout_s=1)
    with pytest.raises(FailedPrecondition, match="the weights are on cpu"):
        await transport.stage(BUCKETS[0], torch.zeros(8, dtype=torch.uint8))
