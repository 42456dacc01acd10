"""Client of the weight versions that the ledger keeps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from milepost import types as t
from milepost.client.base import ServiceClient, duration
from milepost.convert import from_proto
from milepost.v1 import weights_pb2 as pb
from milepost.v1 import weights_pb2_grpc


class WeightClient(ServiceClient):
    """WeightService, served by the buffer process."""

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(address, **options)
        self._stub: Any = weights_pb2_grpc.WeightServiceStub(self._channel)

    async def reserve_version(
        self, run_id: str, *, term: int, step: int, attempt: int, at_least: int = 0
    ) -> int:
        """Reserves a number for the weights of `step`; the same arguments answer the same number."""
        request = pb.ReserveVersionRequest(
            run_id=run_id, term=term, step=step, attempt=attempt, at_least=at_least
        )
        return (await self._call(self._stub.ReserveVersion, request)).version

    async def publish_version(
        self,
        run_id: str,
        *,
        term: int,
        version: int,
        label: int,
        members: Sequence[str] = (),
        allow_older_label: bool = False,
    ) -> t.WeightVersion:
        """Publishes a reserved number."""
        request = pb.PublishVersionRequest(
            run_id=run_id,
            term=term,
            version=version,
            label=label,
            members=members,
            allow_older_label=allow_older_label,
        )
        reply = await self._call(self._stub.PublishVersion, request)
        return from_proto(t.WeightVersion, reply.version)

    async def get_version(self, run_id: str, *, version: int = 0) -> t.WeightVersion:
        """Reads one version; 0 reads the newest published one, NotFound when there is none."""
        reply = await self._call(self._stub.GetVersion, pb.GetVersionRequest(run_id=run_id, version=version))
        return from_proto(t.WeightVersion, reply.version)

    async def watch_versions(
        self, run_id: str, *, after_version: int = 0, max_wait_s: float = 60.0
    ) -> AsyncIterator[t.WeightVersion]:
        """Streams the newest version now and each publication; ends after `max_wait_s` of quiet."""
        request = pb.WatchVersionsRequest(
            run_id=run_id, after_version=after_version, max_wait=duration(max_wait_s)
        )
        async for message in self._stream(self._stub.WatchVersions, request, quiet_s=max_wait_s):
            yield from_proto(t.WeightVersion, message.version)

    async def lease_router(
        self, run_id: str, *, router_id: str, router_term: int = 0, ttl_s: float | None = None
    ) -> int:
        """Claims or renews the right to run weight transactions of a run; returns the router's term."""
        request = pb.LeaseRouterRequest(
            run_id=run_id, router_id=router_id, router_term=router_term, ttl=duration(ttl_s)
        )
        return (await self._call(self._stub.LeaseRouter, request)).router_term
