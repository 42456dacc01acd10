"""Open routes: health and what the engine is. They need no key and change nothing."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from milepost_engine.engine import Engine
from milepost_engine.http_admin import engine_of
from milepost_engine.http_common import JsonResponse

router = APIRouter(default_response_class=JsonResponse)


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the scheduler thread lives. Paused or without memory is healthy."""
    return Response(status_code=200 if engine_of(request).scheduler.alive else 503)


@router.get("/health_generate")
async def health_generate(request: Request) -> Response:
    """200 when the engine generates a token within its deadline (or, paused, when its scheduler answers)."""
    engine = engine_of(request)
    return Response(status_code=200 if engine.scheduler.alive and await engine.probe() else 503)


@router.get("/model_info")
@router.get("/get_model_info")
async def model_info(request: Request) -> Response:
    """The model and its weight version."""
    engine = engine_of(request)
    path = str(engine.settings.model)
    return JsonResponse(
        {
            "model_path": path,
            "tokenizer_path": path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": engine.scheduler.weight_version,
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": engine.model.config.model_type,
            "architectures": [type(engine.model).__name__],
        }
    )


@router.get("/get_weight_version")
async def get_weight_version(request: Request) -> Response:
    """The weight version alone."""
    return JsonResponse({"weight_version": engine_of(request).scheduler.weight_version})


@router.get("/server_info")
@router.get("/get_server_info")
async def server_info(request: Request) -> Response:
    """Settings, limits and counters; `version` is the imitated release."""
    engine = engine_of(request)
    settings = engine.settings.model_dump(mode="json", exclude={"admin_api_key"})
    own = {
        "model_path": str(engine.settings.model),
        "served_model_name": engine.settings.name,
        "context_length": engine.limits.context_length,
        "vocab_size": engine.limits.vocab_size,
        "weight_version": engine.scheduler.weight_version,
        "version": engine.dialect.name,
        "engine": "milepost_engine",
        "tp_size": 1,
        "status": "ready" if engine.scheduler.alive else "dead",
        "released_memory": sorted(engine.updater.released),
        "uptime_s": time.time() - engine.started_s,
        "internal_states": [_internal_state(engine)],
    }
    return JsonResponse(settings | own)


def _internal_state(engine: Engine) -> dict[str, Any]:
    return engine.scheduler.stats() | {
        "weight_version": engine.scheduler.weight_version,
        "weights_state": engine.weights.state,
        "weights_bytes": engine.weights.size_bytes,
        "released_tags": sorted(engine.scheduler.holds),
    }
