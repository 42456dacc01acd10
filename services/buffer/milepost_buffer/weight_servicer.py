"""WeightService: messages to dataclasses and back, around the versions of the ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator

from milepost.convert import to_proto
from milepost.v1 import weights_pb2 as pb
from milepost_buffer import checks
from milepost_buffer.ledger import Ledger
from milepost_buffer.stamp import seconds, stamped, stamped_stream

DEFAULT_WATCH_S = 60.0
MAX_WATCH_S = 300.0
NAME = "milepost.v1.WeightService"


class WeightServicer:
    """Serves WeightService from one ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    @stamped
    async def ReserveVersion(self, request: pb.ReserveVersionRequest) -> pb.ReserveVersionResponse:
        version = await self.ledger.versions.reserve(
            request.run_id,
            term=request.term,
            step=request.step,
            attempt=request.attempt,
            at_least=request.at_least,
        )
        return pb.ReserveVersionResponse(version=version)

    @stamped
    async def PublishVersion(self, request: pb.PublishVersionRequest) -> pb.PublishVersionResponse:
        version = await self.ledger.versions.publish(
            request.run_id,
            term=request.term,
            version=request.version,
            label=request.label,
            members=list(request.members),
            allow_older_label=request.allow_older_label,
        )
        return pb.PublishVersionResponse(version=to_proto(version))

    @stamped
    async def GetVersion(self, request: pb.GetVersionRequest) -> pb.GetVersionResponse:
        version = await self.ledger.versions.get(request.run_id, version=request.version)
        return pb.GetVersionResponse(version=to_proto(version))

    @stamped_stream
    async def WatchVersions(
        self, request: pb.WatchVersionsRequest
    ) -> AsyncIterator[pb.WatchVersionsResponse]:
        wait_s = checks.check_wait(seconds(request, "max_wait"), most=MAX_WATCH_S)
        if not request.HasField("max_wait"):
            wait_s = DEFAULT_WATCH_S
        versions = self.ledger.versions.watch(
            request.run_id, after_version=request.after_version, max_wait_s=wait_s
        )
        async for version in versions:
            yield pb.WatchVersionsResponse(version=to_proto(version))

    @stamped
    async def LeaseRouter(self, request: pb.LeaseRouterRequest) -> pb.LeaseRouterResponse:
        term = await self.ledger.versions.lease_router(
            request.run_id,
            router_id=request.router_id,
            router_term=request.router_term,
            ttl_s=seconds(request, "ttl"),
        )
        return pb.LeaseRouterResponse(router_term=term)
