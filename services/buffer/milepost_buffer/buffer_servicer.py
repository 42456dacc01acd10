"""BufferService: messages to dataclasses and back, around the ledger. No rule of the ledger lives here."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import grpc

from milepost import errors
from milepost import types as t
from milepost.convert import fill, from_proto, to_proto
from milepost.groups import Chunk, pack_chunks, pack_lease
from milepost.v1 import buffer_pb2 as pb
from milepost.v1 import sample_pb2
from milepost.v1.buffer_pb2_grpc import add_BufferServiceServicer_to_server
from milepost_buffer import checks
from milepost_buffer.audit import audit
from milepost_buffer.ledger import Ledger
from milepost_buffer.prompts import StoredPrompt
from milepost_buffer.spans import begin_put, end_put, leased, sealed
from milepost_buffer.stamp import seconds, stamped, stamped_stream
from milepost_common.telemetry import tracing

CHUNK_BYTES = 1024 * 1024
NAME = "milepost.v1.BufferService"


class BufferServicer:
    """Serves BufferService from one ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    # ------------------------------------------------------------------ runs

    @stamped
    async def CreateRun(self, request: pb.CreateRunRequest) -> pb.CreateRunResponse:
        config = read(t.RunConfig, request.config, "config")
        run, created = await self.ledger.runs.create(request.run_id, config=config)
        return pb.CreateRunResponse(run=to_proto(run), created=created)

    @stamped
    async def GetRun(self, request: pb.GetRunRequest) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=to_proto(await self.ledger.runs.get(request.run_id)))

    @stamped
    async def UpdateRun(self, request: pb.UpdateRunRequest) -> pb.UpdateRunResponse:
        config = read(t.RunConfig, request.config, "config")
        run = await self.ledger.runs.update(request.run_id, config=config, comment=request.comment)
        return pb.UpdateRunResponse(run=to_proto(run))

    # ------------------------------------------------------------------ prompt clients

    @stamped
    async def OpenSource(self, request: pb.OpenSourceRequest) -> pb.OpenSourceResponse:
        position = await self.ledger.prompts.open_source(
            request.run_id, source_id=request.source_id, digest=request.digest
        )
        return to_proto(position)

    @stamped
    async def PutPrompts(self, request: pb.PutPromptsRequest) -> pb.PutPromptsResponse:
        spans = begin_put(request.run_id, [item.prompt for item in request.items]) if tracing.on else ()
        result = await self.ledger.prompts.put(
            request.run_id,
            prompts=[store_prompt(item, f"items[{i}].prompt") for i, item in enumerate(request.items)],
            source_id=request.source_id,
            expected_cursor=request.expected_cursor,
            max_wait_s=checks.check_wait(seconds(request, "max_wait")),
        )
        end_put(spans, accepted=result.accepted)
        return to_proto(result)

    @stamped
    async def CloseSource(self, request: pb.CloseSourceRequest) -> pb.CloseSourceResponse:
        still_open = await self.ledger.prompts.close_source(request.run_id, source_id=request.source_id)
        return pb.CloseSourceResponse(open_sources=still_open)

    @stamped
    async def CancelPrompts(self, request: pb.CancelPromptsRequest) -> pb.CancelPromptsResponse:
        return to_proto(await self.ledger.prompts.cancel(request.run_id, prompt_ids=list(request.prompt_ids)))

    # ------------------------------------------------------------------ gateways

    @stamped
    async def LeasePrompts(self, request: pb.LeasePromptsRequest) -> pb.LeasePromptsResponse:
        found = await self.ledger.prompts.lease(
            request.run_id,
            gateway_id=request.gateway_id,
            instance_id=request.instance_id,
            max_prompts=request.max_prompts,
            max_wait_s=checks.check_wait(seconds(request, "max_wait")),
        )
        reply = pb.LeasePromptsResponse(reason=found.reason)
        for lease in found.leases:
            message = reply.leases.add(
                attempt=lease.attempt,
                min_version=found.min_version,
                num_samples=found.num_samples,
                label=found.label,
            )
            message.prompt.MergeFromString(lease.content)
            message.ttl.FromNanoseconds(round(found.ttl_s * 1e9))
        if tracing.on:
            leased(request.run_id, request.gateway_id, reply.leases)
        return reply

    @stamped
    async def RenewLeases(self, request: pb.RenewLeasesRequest) -> pb.RenewLeasesResponse:
        renewed = await self.ledger.prompts.renew(
            request.run_id,
            instance_id=request.instance_id,
            leases=_keys(request.leases),
            names_all=request.names_all,
        )
        return to_proto(renewed)

    @stamped
    async def ReleasePrompts(self, request: pb.ReleasePromptsRequest) -> pb.ReleasePromptsResponse:
        result = await self.ledger.prompts.release(
            request.run_id,
            instance_id=request.instance_id,
            leases=_keys(request.leases),
            drop_reason=enum(t.DropReason, request.drop_reason, "drop_reason"),
            detail=request.detail,
            failed=request.failed,
            exhausted_reason=enum(t.DropReason, request.exhausted_reason, "exhausted_reason"),
        )
        return to_proto(result)

    @stamped
    async def PutGroups(self, request: pb.PutGroupsRequest) -> pb.PutGroupsResponse:
        groups = [
            t.Group(header=read(t.GroupHeader, g.header, f"groups[{i}].header"), payload=g.payload)
            for i, g in enumerate(request.groups)
        ]
        started_ns = time.time_ns()
        results = await self.ledger.prompts.seal(request.run_id, groups=groups)
        if tracing.on:
            sealed(request.run_id, groups, results, started_ns=started_ns)
        return pb.PutGroupsResponse(results=[to_proto(r) for r in results])

    # ------------------------------------------------------------------ learners

    @stamped
    async def LeaseStep(self, request: pb.LeaseStepRequest) -> bytes:
        lease = await self.ledger.steps.lease(
            request.run_id,
            consumer_id=request.consumer_id,
            term=request.term,
            step=request.step,
            max_wait_s=checks.check_wait(seconds(request, "max_wait")),
            inline_bytes=request.inline_bytes,
        )
        return pack_lease(lease)

    @stamped_stream
    async def FetchGroups(self, request: pb.FetchGroupsRequest) -> AsyncIterator[bytes]:
        small: list[Chunk] = []
        size = 0
        async for name, payload in self.ledger.steps.payloads(
            request.run_id, prompt_ids=list(request.prompt_ids)
        ):
            if size + len(payload) > CHUNK_BYTES and size:
                yield pack_chunks(small)
                small, size = [], 0
            if len(payload) <= CHUNK_BYTES:
                small.append(Chunk(name, payload, 0, len(payload)))
                size += len(payload)
                continue
            whole = memoryview(payload)
            for offset in range(0, len(payload), CHUNK_BYTES):
                data = whole[offset : offset + CHUNK_BYTES]
                yield pack_chunks([Chunk(name, data, offset, len(payload))])
        if small:
            yield pack_chunks(small)

    @stamped
    async def CommitStep(self, request: pb.CommitStepRequest) -> pb.CommitStepResponse:
        result = await self.ledger.steps.commit(
            request.run_id,
            consumer_id=request.consumer_id,
            term=request.term,
            step=request.step,
            prompt_ids=list(request.prompt_ids),
            dropped=[read(t.DroppedGroup, d, "dropped") for d in request.dropped],
        )
        return to_proto(result)

    @stamped
    async def ResumeConsumer(self, request: pb.ResumeConsumerRequest) -> pb.ResumeConsumerResponse:
        if not request.HasField("term"):
            if request.HasField("checkpoint_step") or request.manifest:
                raise errors.InvalidArgument(
                    "checkpoint_step: it needs the term; open one with ResumeConsumer first"
                )
            return to_proto(
                await self.ledger.steps.open_term(request.run_id, consumer_id=request.consumer_id)
            )
        if not request.HasField("checkpoint_step"):
            raise errors.InvalidArgument(
                "checkpoint_step is unset; with term, say which checkpoint was loaded"
            )
        point = await self.ledger.steps.state_checkpoint(
            request.run_id,
            consumer_id=request.consumer_id,
            term=request.term,
            checkpoint_step=request.checkpoint_step,
            manifest=[read(t.StepManifest, m, "manifest") for m in request.manifest],
            on_gap=enum(t.OnGap, request.on_gap, "on_gap"),
        )
        return to_proto(point)

    @stamped
    async def TrimCheckpointed(self, request: pb.TrimCheckpointedRequest) -> pb.TrimCheckpointedResponse:
        result = await self.ledger.steps.trim(
            request.run_id, consumer_id=request.consumer_id, term=request.term, step=request.step
        )
        return to_proto(result)

    # ------------------------------------------------------------------ accounts

    @stamped_stream
    async def GetLedger(self, request: pb.GetLedgerRequest) -> AsyncIterator[pb.GetLedgerResponse]:
        pages = self.ledger.accounts.rows(
            request.run_id,
            states=[enum(t.PromptState, s, "states") for s in request.states],
            prompt_ids=list(request.prompt_ids),
            from_step=request.from_step,
        )
        async for rows in pages:
            if rows:
                yield pb.GetLedgerResponse(rows=[to_proto(r) for r in rows])

    @stamped
    async def GetStats(self, request: pb.GetStatsRequest) -> pb.GetStatsResponse:
        reply = pb.GetStatsResponse()
        names = [request.run_id] if request.run_id else await self.ledger.store.runs()
        for run_id in names:
            try:
                fill(reply.runs.add(), await self.ledger.accounts.stats(run_id))
            except errors.NotFound:
                if request.run_id:
                    raise
                del reply.runs[-1]  # named by a CreateRun that did not come through
        return reply

    @stamped
    async def AuditLedger(self, request: pb.AuditLedgerRequest) -> pb.AuditLedgerResponse:
        witnesses = [read(t.Witness, w, "witnesses") for w in request.witnesses]
        return to_proto(await audit(self.ledger.accounts, request.run_id, witnesses=witnesses))


def add_to_server(servicer: BufferServicer, server: Any) -> None:
    """As generated code adds it, except that the replies that hold payloads are bytes already."""
    generated = _Generated()
    add_BufferServiceServicer_to_server(cast(Any, servicer), cast(Any, generated))
    generated.handlers["FetchGroups"] = grpc.unary_stream_rpc_method_handler(
        cast(Any, servicer.FetchGroups), request_deserializer=pb.FetchGroupsRequest.FromString
    )
    generated.handlers["LeaseStep"] = grpc.unary_unary_rpc_method_handler(
        cast(Any, servicer.LeaseStep), request_deserializer=pb.LeaseStepRequest.FromString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, generated.handlers),))


class _Generated:
    """Takes the handlers that generated code makes."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """The same handlers, in a form that cannot be changed."""

    def add_registered_method_handlers(self, name: str, handlers: dict[str, Any]) -> None:
        """The handlers of one service by method."""
        self.handlers.update(handlers)


def read(kind: Any, message: Any, field: str) -> Any:
    """A dataclass of a message; an enum number that nobody knows is the caller's mistake."""
    try:
        return from_proto(kind, message)
    except ValueError as error:
        raise errors.InvalidArgument(f"{field}: {error}; use the numbers of the proto") from error


def enum(kind: Any, number: int, field: str) -> Any:
    """A member of an enum by its number."""
    try:
        return kind(number)
    except ValueError as error:
        raise errors.InvalidArgument(f"{field} = {number}: {error}; use the numbers of the proto") from error


def store_prompt(item: pb.PromptItem, where: str) -> StoredPrompt:
    """Checks a prompt and makes what the ledger keeps of it. The trace context is not part of its content."""
    message = item.prompt
    if len(message.input_ids) % 4:
        raise errors.InvalidArgument(
            f"{where}.input_ids has {len(message.input_ids)} bytes; give int32 ids, 4 bytes each"
        )
    content = message.SerializeToString(deterministic=True)
    prompt: t.Prompt = from_proto(t.Prompt, message)
    checks.check_prompt(prompt, size_bytes=len(content), where=where)
    same = content
    if message.traceparent:
        bare = sample_pb2.Prompt.FromString(content)
        bare.ClearField("traceparent")
        same = bare.SerializeToString(deterministic=True)
    return StoredPrompt(
        prompt_id=message.prompt_id,
        content=content,
        digest=hashlib.sha256(same).digest()[:16],
        cursor=item.cursor,
    )


def _keys(messages: Sequence[pb.LeaseKey]) -> list[t.LeaseKey]:
    return [t.LeaseKey(prompt_id=m.prompt_id, attempt=m.attempt) for m in messages]
