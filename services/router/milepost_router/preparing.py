"""What a prepare may ask, and which engines it concerns. Pure functions.

needs the weights  and  may take part now  and  takes the transport  and  speaks rank 0's NCCL
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from milepost import types as t
from milepost.errors import FailedPrecondition, InvalidArgument
from milepost.types import EngineState, Transport
from milepost_router.groups import COLLECTIVE
from milepost_router.record import EngineRecord

_RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def validate(request: t.PrepareRequest) -> None:
    """Refuses a request that makes no sense.

    Raises:
      InvalidArgument: names the field, its value and the remedy.
    """
    if not _RUN_ID.fullmatch(request.run_id) or request.run_id == "updating":
        raise InvalidArgument(f"run_id = {request.run_id!r}: give 1 to 128 characters of [A-Za-z0-9._-]")
    if request.term < 1 or request.attempt < 1:
        raise InvalidArgument(
            f"term = {request.term}, attempt = {request.attempt}: both count from 1; take the term that "
            "ResumeConsumer gave"
        )
    if request.transport is Transport.UNSPECIFIED:
        raise InvalidArgument(f"transport = UNSPECIFIED: give {', '.join(x.name for x in Transport if x)}")
    if request.transport in COLLECTIVE and not (request.master_address and request.master_port):
        raise InvalidArgument(
            f"master_address = {request.master_address!r}, master_port = {request.master_port}: "
            f"{request.transport.name} needs the address at which rank 0 listens"
        )
    if not request.manifest and request.transport is not Transport.DISK:
        raise InvalidArgument("manifest is empty; name every tensor that will be sent")
    if len({spec.name for spec in request.manifest}) != len(request.manifest):
        raise InvalidArgument("manifest names a tensor twice; name each once")


def serves(record: EngineRecord, request: t.PrepareRequest) -> bool:
    """It serves what is being published."""
    if record.state is not EngineState.SERVING or record.version == 0:
        return False
    if request.version:
        return record.version == request.version
    return record.label == request.label


def takes(record: EngineRecord, transport: Transport) -> bool:
    """It takes a transport, as far as is known."""
    return not record.capabilities.transports or transport in record.capabilities.transports


def require_takes(record: EngineRecord, request: t.PrepareRequest) -> None:
    """Refuses an engine that was named and cannot take part.

    Raises:
      InvalidArgument: it does not take the transport.
      FailedPrecondition: it works for another run.
    """
    if not takes(record, request.transport):
        able = ", ".join(x.name for x in record.capabilities.transports)
        raise InvalidArgument(
            f"transport = {request.transport.name}: engine {record.engine_id} takes {able}; choose of these"
        )
    if record.home_run not in ("", request.run_id):
        raise FailedPrecondition(
            f"engine_ids: {record.engine_id} is configured for run {record.home_run!r}, not for "
            f"{request.run_id!r}; change its run_id, or leave that empty so that any run may claim it"
        )


def other_nccl(record: EngineRecord, request: t.PrepareRequest) -> str:
    """Why an engine cannot share a communicator with rank 0; empty where it can, or where nobody knows.

    NCCL refuses another release, on some ranks by an error and on others by waiting for them.
    """
    theirs, ours = record.capabilities.nccl_version, request.nccl_version
    if request.transport is not Transport.NCCL or not theirs or not ours or theirs == ours:
        return ""
    return f"engine {record.engine_id} has NCCL {theirs}, the trainer {ours}; install the same for both"


def unknown_nccl(records: Sequence[EngineRecord], request: t.PrepareRequest) -> list[str]:
    """Engines whose NCCL nobody named: those that our launcher did not start."""
    if request.transport is not Transport.NCCL:
        return []
    return [e.engine_id for e in records if not e.capabilities.nccl_version]
