"""Client of the fleet: engines and the weight transaction."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing
from typing import Any

from milepost import types as t
from milepost.client.base import ServiceClient, closing, duration
from milepost.convert import from_proto, to_proto
from milepost.v1 import router_pb2 as pb
from milepost.v1 import router_pb2_grpc


class RouterClient(ServiceClient):
    """RouterService."""

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(address, **options)
        self._stub: Any = router_pb2_grpc.RouterServiceStub(self._channel)

    async def register_engine(self, engine: t.Engine, *, admin_api_key: str = "") -> t.Registration:
        """Adds an engine, or brings it back."""
        request = pb.RegisterEngineRequest(engine=to_proto(engine), admin_api_key=admin_api_key)
        return from_proto(t.Registration, await self._call(self._stub.RegisterEngine, request))

    async def heartbeat(self, engine_id: str, *, instance_id: str) -> t.Heard:
        """Keeps a registered engine alive; NotFound: register again."""
        request = pb.HeartbeatRequest(engine_id=engine_id, instance_id=instance_id)
        return from_proto(t.Heard, await self._call(self._stub.Heartbeat, request))

    async def drain_engine(self, engine_id: str, *, max_wait_s: float | None = None) -> int:
        """Sends an engine no new requests; returns how many are still in flight."""
        request = pb.DrainEngineRequest(engine_id=engine_id, max_wait=duration(max_wait_s))
        return (await self._call(self._stub.DrainEngine, request, wait_s=max_wait_s)).in_flight

    async def remove_engine(self, engine_id: str) -> bool:
        """Forgets an engine; False when it was not known."""
        return (
            await self._call(self._stub.RemoveEngine, pb.RemoveEngineRequest(engine_id=engine_id))
        ).removed

    async def list_engines(self, run_id: str = "") -> t.Fleet:
        """Lists the engines of a run, or all."""
        reply = await self._call(self._stub.ListEngines, pb.ListEnginesRequest(run_id=run_id))
        return from_proto(t.Fleet, reply)

    async def watch_fleet(self, run_id: str = "", *, max_interval_s: float = 10.0) -> AsyncIterator[t.Fleet]:
        """Streams the fleet now, at each change, and at least every `max_interval_s`."""
        request = pb.WatchFleetRequest(run_id=run_id, max_interval=duration(max_interval_s))
        async for message in self._stream(self._stub.WatchFleet, request, quiet_s=max_interval_s):
            yield from_proto(t.Fleet, message)

    async def prepare_weights(self, request: t.PrepareRequest) -> t.Prepared:
        """Opens a weight transaction."""
        reply = await self._call(self._stub.PrepareWeights, to_proto(request), timeout_s=60.0)
        return from_proto(t.Prepared, reply)

    async def update_weights(
        self, buckets: AsyncIterable[t.BucketHeader], *, timeout_s: float
    ) -> AsyncIterator[t.BucketAck]:
        """Sends bucket headers and yields the members' acknowledgements as they come; never retried."""

        async def requests() -> AsyncGenerator[Any]:
            async with closing(buckets) as each:
                async for bucket in each:
                    yield to_proto(bucket)

        call = self._exchange(self._stub.UpdateWeights, requests(), timeout_s=timeout_s)
        async with aclosing(call) as acks:
            async for message in acks:
                yield from_proto(t.BucketAck, message)

    async def commit_weights(
        self, transaction_id: str, *, fleet_epoch: int, term: int, num_buckets: int, timeout_s: float = 60.0
    ) -> t.Committed:
        """Verifies and publishes; idempotent."""
        request = pb.CommitWeightsRequest(
            transaction_id=transaction_id, fleet_epoch=fleet_epoch, term=term, num_buckets=num_buckets
        )
        reply = await self._call(self._stub.CommitWeights, request, timeout_s=timeout_s)
        return from_proto(t.Committed, reply)

    async def release_memory(
        self,
        run_id: str,
        *,
        term: int,
        tags: tuple[str, ...] = (),
        drain_s: float = 0.0,
        lease_s: float = 600.0,
    ) -> t.MemoryChange:
        """Has the run's engines give up GPU memory; the router takes it back by itself after `lease_s`."""
        request = pb.ReleaseMemoryRequest(
            run_id=run_id, term=term, tags=tags, drain=duration(drain_s), lease=duration(lease_s)
        )
        reply = await self._call(self._stub.ReleaseMemory, request, timeout_s=60.0 + drain_s)
        return t.MemoryChange(engines=tuple(reply.released), failed=dict(reply.failed))

    async def resume_memory(self, run_id: str, *, term: int) -> t.MemoryChange:
        """Has them take it back; they are STALE until they have been given weights."""
        request = pb.ResumeMemoryRequest(run_id=run_id, term=term)
        reply = await self._call(self._stub.ResumeMemory, request, timeout_s=60.0)
        return t.MemoryChange(engines=tuple(reply.resumed), failed=dict(reply.failed))

    async def abort_weights(self, transaction_id: str, *, term: int, reason: str) -> tuple[str, ...]:
        """Ends a transaction without publishing; returns the engines that are STALE now."""
        request = pb.AbortWeightsRequest(transaction_id=transaction_id, term=term, reason=reason)
        return tuple((await self._call(self._stub.AbortWeights, request, timeout_s=60.0)).stale)
