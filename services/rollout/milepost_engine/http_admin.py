"""Control routes: pausing, aborting, weights, memory. SGLang's names, bodies, defaults and replies.

All of them want `Authorization: Bearer <admin_api_key>` when the engine has such a key. A refusal is a 400
with `{"success": false, "message": ...}`; see `updates` for what is checked when. Defaults are SGLang's, also
where they are traps: `flush_cache` and `update_weight_version`'s `abort_all_requests` are true when absent.
"""

from __future__ import annotations

import asyncio
import hmac
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import PlainTextResponse, Response

from milepost_engine.engine import Engine
from milepost_engine.errors import Forbidden, InvalidRequest, NotSupported
from milepost_engine.groups import GroupSpec
from milepost_engine.http_common import JsonResponse
from milepost_engine.scheduler import PauseMode
from milepost_engine.updates import UpdateOptions

_FLUSH_POLL_S = 0.02
_MAX_FLUSH_WAIT_S = 60.0


class _Body(BaseModel):
    """Bodies ignore fields they do not know, as SGLang's do, and convert nothing."""

    model_config = ConfigDict(frozen=True, strict=True, protected_namespaces=())


class AbortBody(_Body):
    """`/abort_request`: one request and its samples (by prefix), or all."""

    rid: str = ""
    abort_all: bool = False
    abort_message: str | None = None


class PauseBody(_Body):
    """`/pause_generation`."""

    mode: PauseMode = "abort"


class InitGroupBody(_Body):
    """`/init_weights_update_group`."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


class DestroyGroupBody(_Body):
    """`/destroy_weights_update_group`."""

    group_name: str = "weight_update_group"


class _UpdateBody(_Body):
    load_format: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None

    def options(self) -> UpdateOptions:
        return UpdateOptions(
            flush_cache=self.flush_cache,
            abort_all_requests=self.abort_all_requests,
            weight_version=self.weight_version,
        )


class DistributedBody(_UpdateBody):
    """`/update_weights_from_distributed`: the header of what rank 0 will broadcast."""

    names: list[Any]
    dtypes: list[Any]
    shapes: list[Any]
    group_name: str = "weight_update_group"


class TensorBody(_UpdateBody):
    """`/update_weights_from_tensor`: one shm descriptor per rank."""

    serialized_named_tensors: list[Any]


class DiskBody(_UpdateBody):
    """`/update_weights_from_disk`."""

    model_path: str


class VersionBody(_Body):
    """`/update_weight_version`."""

    new_version: str
    abort_all_requests: bool = True


class CheckerBody(_Body):
    """`/weights_checker`."""

    action: str = "checksum"
    names: list[Any] = []
    dtypes: list[Any] = []
    shapes: list[Any] = []


class ByNameBody(_Body):
    """`/get_weights_by_name`."""

    name: str
    truncate_size: int = 100


class MemoryBody(_Body):
    """`/release_memory_occupation`, `/resume_memory_occupation`."""

    tags: list[str] | None = None


def engine_of(request: Request) -> Engine:
    """The engine this app serves."""
    return request.app.state.engine


def require_key(request: Request) -> None:
    """Refuses a call without the admin key, where there is one."""
    key = engine_of(request).settings.admin_api_key
    given = request.headers.get("authorization", "")
    if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise Forbidden(
            "this route needs 'Authorization: Bearer <admin_api_key>': send the engine's admin key"
        )


EngineDep = Annotated[Engine, Depends(engine_of)]
router = APIRouter(dependencies=[Depends(require_key)], default_response_class=JsonResponse)


def _ok(message: str = "Success", **more: Any) -> JsonResponse:
    return JsonResponse({"success": True, "message": message, **more})


# ---- requests in flight ------------------------------------------------------------------------------------


@router.post("/abort_request")
async def abort_request(body: AbortBody, engine: EngineDep) -> Response:
    """Ends requests; they reply with what they have, `finish_reason` abort."""
    if not body.rid and not body.abort_all:
        raise InvalidRequest("rid is empty and abort_all false: name a request, or abort all")
    scheduler = engine.scheduler
    message = body.abort_message or "Aborted by /abort_request"
    await engine.updater.run(
        lambda: scheduler.abort(rid=body.rid, everything=body.abort_all, message=message)
    )
    return Response(status_code=200)


@router.post("/pause_generation")
async def pause_generation(engine: EngineDep, body: Annotated[PauseBody | None, Body()] = None) -> Response:
    """Stops forward passes until `/continue_generation`."""
    mode = (body or PauseBody()).mode
    await engine.updater.run(lambda: engine.scheduler.pause(mode))
    return JsonResponse({"message": "Generation paused successfully.", "status": "ok"})


@router.post("/continue_generation")
async def continue_generation(engine: EngineDep) -> Response:
    """Ends a pause."""
    await engine.updater.run(engine.scheduler.resume)
    return JsonResponse({"message": "Generation continued successfully.", "status": "ok"})


@router.api_route("/flush_cache", methods=["GET", "POST"])
async def flush_cache(engine: EngineDep, timeout: float = 0.0) -> Response:
    """Drops cached KV; 400 while requests hold some, after waiting up to `timeout` seconds for them."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + min(timeout, _MAX_FLUSH_WAIT_S)
    while not await engine.updater.run(lambda: engine.scheduler.can_flush):
        if loop.time() >= deadline:
            return PlainTextResponse(
                f"Flush cache failed: {engine.scheduler.num_live} requests are live. "
                "Wait for them, abort them, or pause_generation with mode abort or retract.\n",
                status_code=400,
            )
        await asyncio.sleep(_FLUSH_POLL_S)
    return PlainTextResponse("Cache flushed.\n")


# ---- weights -----------------------------------------------------------------------------------------------


@router.post("/init_weights_update_group")
async def init_weights_update_group(body: InitGroupBody, engine: EngineDep) -> Response:
    """Joins a process group; returns when all members have."""
    spec = GroupSpec(
        name=body.group_name,
        master_address=body.master_address,
        master_port=body.master_port,
        rank=body.rank_offset,
        world_size=body.world_size,
        backend=body.backend,
    )
    await engine.groups.init(spec)
    return _ok("Succeeded to initialize custom process group.")


@router.post("/destroy_weights_update_group")
async def destroy_weights_update_group(body: DestroyGroupBody, engine: EngineDep) -> Response:
    """Leaves a group; a transfer in it fails at once."""
    engine.groups.destroy(body.group_name)
    return _ok("Succeeded to destroy custom process group.")


@router.post("/update_weights_from_distributed")
async def update_weights_from_distributed(body: DistributedBody, engine: EngineDep) -> Response:
    """Receives tensors by broadcast from rank 0 of a group."""
    specs = engine.updater.tensor_specs(body.names, body.dtypes, body.shapes)
    await engine.updater.from_distributed(
        specs, group_name=body.group_name, load_format=body.load_format, options=body.options()
    )
    return _ok("Succeeded to update parameter online.")


@router.post("/update_weights_from_tensor")
async def update_weights_from_tensor(body: TensorBody, engine: EngineDep) -> Response:
    """Reads tensors from shared memory."""
    await engine.updater.from_shm(
        body.serialized_named_tensors, load_format=body.load_format, options=body.options()
    )
    return _ok()


@router.post("/update_weights_from_disk")
async def update_weights_from_disk(body: DiskBody, engine: EngineDep) -> Response:
    """Reads all weights from a folder of safetensors."""
    await engine.updater.from_disk(
        Path(body.model_path), load_format=body.load_format, options=body.options()
    )
    return _ok("Succeeded to update model weights.", num_paused_requests=0)


@router.post("/begin_weight_update")
async def begin_weight_update(engine: EngineDep) -> Response:
    """Opens an update session (0.5.21)."""
    _require_sessions(engine)
    engine.updater.begin()
    return _ok()


@router.post("/end_weight_update")
async def end_weight_update(engine: EngineDep) -> Response:
    """Closes the update session (0.5.21)."""
    _require_sessions(engine)
    engine.updater.end()
    return _ok()


def _require_sessions(engine: Engine) -> None:
    if not engine.dialect.has_update_session:
        raise NotSupported(f"{engine.dialect.name} has no weight update sessions: update without one")


@router.post("/update_weight_version")
async def update_weight_version(body: VersionBody, engine: EngineDep) -> Response:
    """Names the weights."""
    await engine.updater.set_version(body.new_version, abort_all_requests=body.abort_all_requests)
    return _ok(f"Weight version updated to {body.new_version}", new_version=body.new_version)


@router.post("/weights_checker")
async def weights_checker(engine: EngineDep, body: Annotated[CheckerBody | None, Body()] = None) -> Response:
    """snapshot, reset_tensors, compare, checksum; the checksum's recipe stands in `weights`.

    Of our own: `fits`, which refuses tensors (`names`, `dtypes`, `shapes`) that are not the whole model.
    """
    asked = body or CheckerBody()
    if asked.action == "fits":
        await engine.updater.require_fit(asked.names, asked.dtypes, asked.shapes)
        return _ok()
    sums = await engine.updater.checker(asked.action)
    if sums is None:
        return _ok()
    one = {
        "tp_rank": 0,
        "tp_size": 1,
        "dp_rank": 0,
        "dp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "rank": 0,
        "size": 1,
    }
    rank = {"checksums": sums.tensors, "per_gpu_checksum": sums.overall, "parallelism_info": one}
    return _ok(ranks=[rank])


@router.api_route("/get_weights_by_name", methods=["GET", "POST"])
async def get_weights_by_name(body: ByNameBody, engine: EngineDep) -> Response:
    """The first entries of one tensor."""
    if body.truncate_size < 0:
        raise InvalidRequest(f"truncate_size is {body.truncate_size}: it must be at least 0")
    return JsonResponse(await engine.updater.read(body.name, rows=body.truncate_size))


# ---- memory ------------------------------------------------------------------------------------------------


@router.api_route("/release_memory_occupation", methods=["GET", "POST"])
async def release_memory_occupation(
    engine: EngineDep, body: Annotated[MemoryBody | None, Body()] = None
) -> Response:
    """Frees KV cache, weights or both."""
    await engine.updater.release(body.tags if body else None)
    return JsonResponse(None)


@router.api_route("/resume_memory_occupation", methods=["GET", "POST"])
async def resume_memory_occupation(
    engine: EngineDep, body: Annotated[MemoryBody | None, Body()] = None
) -> Response:
    """Takes memory back; released weights must be updated before anything is generated."""
    await engine.updater.resume(body.tags if body else None)
    return JsonResponse(None)
