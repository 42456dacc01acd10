"""Client of the ledger: prompts, groups, steps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from milepost import tracing
from milepost import types as t
from milepost.client.base import ServiceClient, duration
from milepost.convert import fill, from_proto, to_proto
from milepost.errors import DataLoss
from milepost.groups import pack_put
from milepost.v1 import buffer_pb2 as pb
from milepost.v1 import buffer_pb2_grpc

PUBLISHER = "trainer"


class BufferClient(ServiceClient):
    """BufferService. Every mutation may be repeated; see the proto for errors."""

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(address, **options)
        self._stub: Any = buffer_pb2_grpc.BufferServiceStub(self._channel)
        self._stub.PutGroups = self._channel.unary_unary(  # of bytes: the request is packed here
            "/milepost.v1.BufferService/PutGroups", response_deserializer=pb.PutGroupsResponse.FromString
        )

    # ------------------------------------------------------------------ runs

    async def create_run(self, run_id: str, *, config: t.RunConfig | None = None) -> t.Run:
        """Makes a run, or reads it when it is there with the same config; other config: AlreadyExists."""
        request = pb.CreateRunRequest(run_id=run_id, config=to_proto(config or t.RunConfig()))
        return from_proto(t.Run, (await self._call(self._stub.CreateRun, request)).run)

    async def get_run(self, run_id: str) -> t.Run:
        """Reads a run; unknown: NotFound."""
        reply = await self._call(self._stub.GetRun, pb.GetRunRequest(run_id=run_id))
        return from_proto(t.Run, reply.run)

    async def update_run(self, run_id: str, *, config: t.RunConfig, comment: str = "") -> t.Run:
        """Changes live settings: only the fields that are set."""
        request = pb.UpdateRunRequest(run_id=run_id, config=to_proto(config), comment=comment)
        return from_proto(t.Run, (await self._call(self._stub.UpdateRun, request)).run)

    # ------------------------------------------------------------------ prompt clients

    async def open_source(self, run_id: str, *, source_id: str, digest: str = "") -> t.SourcePosition:
        """Opens a source, or reads the cursor of an open one; another digest: FailedPrecondition."""
        request = pb.OpenSourceRequest(run_id=run_id, source_id=source_id, digest=digest)
        return from_proto(t.SourcePosition, await self._call(self._stub.OpenSource, request))

    async def put_prompts(
        self,
        run_id: str,
        *,
        items: Sequence[t.PromptItem],
        source_id: str = "",
        expected_cursor: str = "",
        max_wait_s: float | None = None,
    ) -> t.PutPromptsResult:
        """Offers up to 1024 prompts; a prefix is accepted. None for want of credits: ResourceExhausted.

        Prompts without a `traceparent` join the active span's trace, where there is one.
        """
        request = pb.PutPromptsRequest(
            run_id=run_id,
            source_id=source_id,
            expected_cursor=expected_cursor,
            items=[to_proto(i) for i in items],
            max_wait=duration(max_wait_s),
        )
        tracing.mark((item.prompt for item in request.items), tracing.active())
        reply = await self._call(self._stub.PutPrompts, request, wait_s=max_wait_s)
        return from_proto(t.PutPromptsResult, reply)

    async def close_source(self, run_id: str, *, source_id: str) -> int:
        """Says that a source has no more prompts; returns how many sources are still open."""
        request = pb.CloseSourceRequest(run_id=run_id, source_id=source_id)
        return (await self._call(self._stub.CloseSource, request)).open_sources

    async def cancel_prompts(self, run_id: str, *, prompt_ids: Iterable[str]) -> t.CancelResult:
        """Drops prompts that are not trained yet."""
        request = pb.CancelPromptsRequest(run_id=run_id, prompt_ids=prompt_ids)
        return from_proto(t.CancelResult, await self._call(self._stub.CancelPrompts, request))

    # ------------------------------------------------------------------ gateways

    async def lease_prompts(
        self,
        run_id: str,
        *,
        gateway_id: str,
        instance_id: str,
        max_prompts: int,
        max_wait_s: float | None = None,
    ) -> t.PromptLeases:
        """Claims prompts to roll out, as many as admission allows."""
        request = pb.LeasePromptsRequest(
            run_id=run_id,
            gateway_id=gateway_id,
            instance_id=instance_id,
            max_prompts=max_prompts,
            max_wait=duration(max_wait_s),
        )
        reply = await self._call(self._stub.LeasePrompts, request, wait_s=max_wait_s)
        return from_proto(t.PromptLeases, reply)

    async def renew_leases(
        self, run_id: str, *, instance_id: str, leases: Iterable[t.LeaseKey], names_all: bool = False
    ) -> t.RenewedLeases:
        """Extends leases; stop working on those that come back as lost.

        Args:
          run_id: the run.
          instance_id: the gateway's instance.
          leases: at least one, unless `names_all` is set.
          names_all: these are all that the instance knows of: the answer names the others.
        """
        request = pb.RenewLeasesRequest(
            run_id=run_id,
            instance_id=instance_id,
            leases=[to_proto(x) for x in leases],
            names_all=names_all,
        )
        return from_proto(t.RenewedLeases, await self._call(self._stub.RenewLeases, request))

    async def release_prompts(
        self,
        run_id: str,
        *,
        instance_id: str,
        leases: Iterable[t.LeaseKey],
        drop_reason: t.DropReason = t.DropReason.UNSPECIFIED,
        detail: str = "",
        failed: bool = False,
        exhausted_reason: t.DropReason = t.DropReason.UNSPECIFIED,
    ) -> t.ReleaseResult:
        """Gives leases back to the front of the queue, or drops their prompts with a reason."""
        request = pb.ReleasePromptsRequest(
            run_id=run_id,
            instance_id=instance_id,
            leases=[to_proto(x) for x in leases],
            drop_reason=int(drop_reason),  # type: ignore[arg-type]  # same numbers
            detail=detail,
            failed=failed,
            exhausted_reason=int(exhausted_reason),  # type: ignore[arg-type]  # same numbers
        )
        return from_proto(t.ReleaseResult, await self._call(self._stub.ReleasePrompts, request))

    async def put_groups(self, run_id: str, *, groups: Sequence[t.Group]) -> tuple[t.SealResult, ...]:
        """Seals groups, each on its own; one result a group, in order."""
        reply = await self._call(self._stub.PutGroups, pack_put(run_id, groups))
        return tuple(from_proto(t.SealResult, r) for r in reply.results)

    # ------------------------------------------------------------------ learners

    async def lease_step(
        self,
        run_id: str,
        *,
        term: int,
        step: int,
        max_wait_s: float | None = None,
        inline_bytes: int = 0,
        consumer_id: str = PUBLISHER,
    ) -> t.StepLease:
        """Assigns the groups of a step, or says why there are none yet; run finished: OutOfRange.

        Args:
          run_id: the run.
          term: of the consumer.
          step: from 1; asked again, it is the same.
          max_wait_s: how long to wait for it to fill.
          inline_bytes: of payloads that may come along, which spares the call of `fetch_groups`.
          consumer_id: the consumer.
        """
        request = pb.LeaseStepRequest(
            run_id=run_id,
            consumer_id=consumer_id,
            term=term,
            step=step,
            max_wait=duration(max_wait_s),
            inline_bytes=inline_bytes,
        )
        reply = await self._call(self._stub.LeaseStep, request, wait_s=max_wait_s)
        return from_proto(t.StepLease, reply)

    async def fetch_groups(
        self, run_id: str, *, prompt_ids: Sequence[str], timeout_s: float = 60.0
    ) -> AsyncIterator[tuple[str, bytes]]:
        """Streams (prompt_id, payload) in the order asked for; silence ends it as it ends a call."""
        request = pb.FetchGroupsRequest(run_id=run_id, prompt_ids=prompt_ids)
        parts: list[bytes] = []
        messages = self._stream(self._stub.FetchGroups, request, timeout_s=timeout_s, quiet_s=0.0)
        async for message in messages:
            for chunk in message.chunks:
                parts.append(chunk.data)
                received = chunk.offset_bytes + len(chunk.data)
                if received == chunk.total_bytes:
                    yield chunk.prompt_id, b"".join(parts)
                    parts = []
        if parts:
            raise DataLoss("fetch_groups: the stream ended in the middle of a group; fetch it again")

    async def commit_step(
        self,
        run_id: str,
        *,
        term: int,
        step: int,
        prompt_ids: Sequence[str],
        dropped: Sequence[t.DroppedGroup] = (),
        consumer_id: str = PUBLISHER,
    ) -> t.CommitResult:
        """Makes a step's groups TRAINED."""
        request = pb.CommitStepRequest(
            run_id=run_id,
            consumer_id=consumer_id,
            term=term,
            step=step,
            prompt_ids=prompt_ids,
            dropped=[to_proto(d) for d in dropped],
        )
        return from_proto(t.CommitResult, await self._call(self._stub.CommitStep, request))

    async def resume_consumer(
        self,
        run_id: str,
        *,
        term: int | None = None,
        checkpoint_step: int | None = None,
        manifest: Sequence[t.StepManifest] = (),
        on_gap: t.OnGap = t.OnGap.UNSPECIFIED,
        consumer_id: str = PUBLISHER,
    ) -> t.ResumePoint:
        """Without `term` opens a new one, fencing all older; with it states which checkpoint was loaded."""
        request = pb.ResumeConsumerRequest(
            run_id=run_id,
            consumer_id=consumer_id,
            term=term,
            checkpoint_step=checkpoint_step,
            manifest=[to_proto(m) for m in manifest],
            on_gap=int(on_gap),  # type: ignore[arg-type]  # same numbers
        )
        return from_proto(t.ResumePoint, await self._call(self._stub.ResumeConsumer, request))

    async def trim_checkpointed(
        self, run_id: str, *, term: int, step: int, consumer_id: str = PUBLISHER
    ) -> t.TrimResult:
        """Frees the payloads of steps up to the oldest kept checkpoint."""
        request = pb.TrimCheckpointedRequest(run_id=run_id, consumer_id=consumer_id, term=term, step=step)
        return from_proto(t.TrimResult, await self._call(self._stub.TrimCheckpointed, request))

    # ------------------------------------------------------------------ accounts

    async def get_ledger(
        self,
        run_id: str,
        *,
        states: Sequence[t.PromptState] = (),
        prompt_ids: Sequence[str] = (),
        from_step: int = 0,
        timeout_s: float = 60.0,
    ) -> AsyncIterator[t.LedgerRow]:
        """Streams ledger rows: by step and position first, then in order of acceptance."""
        request = pb.GetLedgerRequest(run_id=run_id, prompt_ids=prompt_ids, from_step=from_step)
        request.states.extend(int(s) for s in states)  # type: ignore[arg-type]  # same numbers
        async for message in self._stream(self._stub.GetLedger, request, timeout_s=timeout_s):
            for row in message.rows:
                yield from_proto(t.LedgerRow, row)

    async def get_stats(self, run_id: str = "") -> tuple[t.RunStats, ...]:
        """Counts of one run, or of every run."""
        reply = await self._call(self._stub.GetStats, pb.GetStatsRequest(run_id=run_id))
        return tuple(from_proto(t.RunStats, r) for r in reply.runs)

    async def audit_ledger(
        self, run_id: str, *, witnesses: Sequence[t.Witness] = (), timeout_s: float = 600.0
    ) -> t.AuditReport:
        """Audits the ledger by itself and against outside witnesses; about a minute for a million prompts."""
        request = pb.AuditLedgerRequest(run_id=run_id)
        for witness in witnesses:
            fill(request.witnesses.add(), witness)
        reply = await self._call(self._stub.AuditLedger, request, timeout_s=timeout_s)
        return from_proto(t.AuditReport, reply)
