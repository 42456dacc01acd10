"""RouterService over gRPC: messages in, domain types to the fleet and the transactions, messages out."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.duration_pb2 import Duration

from milepost import types as t
from milepost.convert import from_proto, to_proto
from milepost.errors import InvalidArgument
from milepost.v1 import router_pb2 as pb
from milepost.v1 import router_pb2_grpc
from milepost_router.fleet import Fleet
from milepost_router.memory import Memory
from milepost_router.probe import Prober
from milepost_router.signals import Signal, wait_for
from milepost_router.transaction import Transaction
from milepost_router.transactions import Transactions, about

MAX_DRAIN_S = 600.0
MEMORY_LEASE_S, MAX_LEASE_S = 600.0, 3600.0
WATCH_INTERVAL_S = 10.0
_MIN_WATCH_S = 0.05


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """The service.

    Args:
      fleet: the engines.
      transactions: weights on their way.
      prober: told of engines that joined.
      changed: fires at each change of the fleet.
      memory: what engines have released.
      heartbeat_interval_s: what engines are asked for.
    """

    def __init__(
        self,
        fleet: Fleet,
        transactions: Transactions,
        prober: Prober,
        changed: Signal,
        *,
        memory: Memory,
        heartbeat_interval_s: float,
    ) -> None:
        self._fleet, self._transactions = fleet, transactions
        self._prober, self._changed = prober, changed
        self._memory, self._heartbeat_interval_s = memory, heartbeat_interval_s
        self._stopping = False

    def stop(self) -> None:
        """Ends the watches."""
        self._stopping = True
        self._changed.fire()

    # ------------------------------------------------------------------------------------ engines

    async def RegisterEngine(self, request: Any, context: Any) -> Any:
        """Adds an engine and looks at it at once."""
        engine = from_proto(t.Engine, request.engine)
        record = self._fleet.join(engine, now=_now(), admin_api_key=request.admin_api_key)
        self._prober.look_at(record)
        return to_proto(
            t.Registration(heartbeat_interval_s=self._heartbeat_interval_s, engine=record.snapshot(_now()))
        )

    async def Heartbeat(self, request: Any, context: Any) -> Any:
        """A sign of life; the answer may order a restart."""
        return to_proto(self._fleet.heartbeat(request.engine_id, request.instance_id, now=_now()))

    async def DrainEngine(self, request: Any, context: Any) -> Any:
        """Takes an engine out of routing and waits for its requests."""
        max_wait_s = _seconds(request, "max_wait", default=0.0, most=MAX_DRAIN_S)
        record = self._fleet.drain(request.engine_id)
        until = _now() + max_wait_s
        while record.in_flight and not self._stopping and _now() < until:
            await self._changed.wait(until - _now())
        return pb.DrainEngineResponse(in_flight=record.in_flight)

    async def RemoveEngine(self, request: Any, context: Any) -> Any:
        """Forgets an engine."""
        return pb.RemoveEngineResponse(removed=self._fleet.remove(request.engine_id))

    async def ListEngines(self, request: Any, context: Any) -> Any:
        """The engines of a run, and unclaimed ones."""
        engines = [to_proto(e.snapshot(_now())) for e in self._fleet.of_run(request.run_id)]
        return pb.ListEnginesResponse(engines=engines, fleet_epoch=self._fleet.fleet_epoch)

    async def WatchFleet(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """The engines now, at each change, and at least every `max_interval`."""
        interval_s = _seconds(request, "max_interval", default=WATCH_INTERVAL_S, most=MAX_DRAIN_S)
        while not self._stopping:
            waiter = self._changed.waiter()
            engines = [to_proto(e.snapshot(_now())) for e in self._fleet.of_run(request.run_id)]
            yield pb.WatchFleetResponse(engines=engines, fleet_epoch=self._fleet.fleet_epoch)
            await wait_for(waiter, max(interval_s, _MIN_WATCH_S))

    # ------------------------------------------------------------------------------------ weights

    async def PrepareWeights(self, request: Any, context: Any) -> Any:
        """Opens a transaction."""
        return to_proto(await self._transactions.prepare(from_proto(t.PrepareRequest, request)))

    async def UpdateWeights(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        """Takes bucket after bucket; the end of the stream is told to the transaction, however it ends."""
        names: set[str] = set()

        def ended(_: Any) -> None:
            for name in names:
                self._transactions.stream_ended(name)

        context.add_done_callback(ended)
        async for message in request_iterator:
            header = from_proto(t.BucketHeader, message)
            if names and header.transaction_id not in names:
                raise InvalidArgument(
                    f"transaction_id = {header.transaction_id!r}: this stream carries {names.pop()!r}; "
                    "open another stream"
                )
            transaction = self._transactions.find(header.transaction_id)
            names.add(header.transaction_id)
            with about(transaction):
                ack = await transaction.take(header)
                if header.commit and header.whole and transaction.is_open:
                    ack = await self._commit_with(transaction, header, ack)
            yield to_proto(ack)
            if ack.group_broken:
                return

    async def _commit_with(
        self, transaction: Transaction, header: t.BucketHeader, ack: t.BucketAck
    ) -> t.BucketAck:
        """The commit that came with the only bucket."""
        committed = await self._transactions.commit(
            header.transaction_id,
            fleet_epoch=header.fleet_epoch,
            term=transaction.plan.request.term,
            num_buckets=1,
        )
        return dataclasses.replace(ack, committed=committed)

    async def CommitWeights(self, request: Any, context: Any) -> Any:
        """Closes a transaction."""
        committed = await self._transactions.commit(
            request.transaction_id,
            fleet_epoch=request.fleet_epoch,
            term=request.term,
            num_buckets=request.num_buckets,
        )
        return to_proto(committed)

    async def AbortWeights(self, request: Any, context: Any) -> Any:
        """Ends a transaction without publishing."""
        stale = await self._transactions.abort(
            request.transaction_id, term=request.term, reason=request.reason
        )
        return pb.AbortWeightsResponse(stale=stale)

    # ------------------------------------------------------------------------------------ memory

    async def ReleaseMemory(self, request: Any, context: Any) -> Any:
        """Has engines give up memory."""
        drain_s = _seconds(request, "drain", default=0.0, most=MAX_DRAIN_S)
        lease_s = _seconds(request, "lease", default=MEMORY_LEASE_S, most=MAX_LEASE_S)
        self._transactions.fence(request.run_id, request.term)
        change = await self._memory.release(
            request.run_id, tags=tuple(request.tags), drain_s=drain_s, lease_s=lease_s
        )
        return pb.ReleaseMemoryResponse(released=change.engines, failed=change.failed)

    async def ResumeMemory(self, request: Any, context: Any) -> Any:
        """Gives it back."""
        self._transactions.fence(request.run_id, request.term)
        change = await self._memory.resume(request.run_id)
        return pb.ResumeMemoryResponse(resumed=change.engines, failed=change.failed)


def _seconds(request: Any, name: str, *, default: float, most: float) -> float:
    """A duration field, bounded.

    Raises:
      InvalidArgument: it is negative or too large.
    """
    if not request.HasField(name):
        return default
    duration: Duration = getattr(request, name)
    seconds = duration.ToNanoseconds() / 1e9
    if not 0 <= seconds <= most:
        raise InvalidArgument(f"{name} = {seconds:g} s: give 0 to {most:g} s")
    return seconds


def _now() -> float:
    return asyncio.get_running_loop().time()
