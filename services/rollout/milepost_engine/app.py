"""The ASGI application: routes, errors and lifespan around one engine."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from milepost_engine import http_admin, http_info
from milepost_engine.engine import Engine
from milepost_engine.errors import EngineError, InvalidRequest
from milepost_engine.http_common import JsonResponse, error_body
from milepost_engine.http_generate import GenerateEndpoint
from milepost_engine.http_openai import ChatEndpoint, CompletionsEndpoint
from milepost_engine.http_openai import router as openai_router

logger = logging.getLogger(__name__)


def create_app(engine: Engine) -> ASGIApp:
    """Builds the application.

    Args:
        engine: Started with the application, stopped with it.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.stop()

    app = FastAPI(title="Milepost CPU engine", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.include_router(http_info.router)
    app.include_router(http_admin.router)
    app.include_router(openai_router)
    app.add_exception_handler(EngineError, _on_engine_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    hot: dict[str, ASGIApp] = {
        "/generate": GenerateEndpoint(engine),
        "/v1/chat/completions": ChatEndpoint(engine),
        "/v1/completions": CompletionsEndpoint(engine),
    }
    return _hot_paths_first(hot, app)


def _hot_paths_first(hot: dict[str, ASGIApp], rest: ASGIApp) -> ASGIApp:
    """Generation by a look-up of its path: trying FastAPI's routes in turn costs more than a small reply."""

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] in ("POST", "PUT")
        endpoint = hot.get(scope["path"], rest) if is_post else rest
        await endpoint(scope, receive, send)

    return dispatch


async def _on_engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    openai = request.url.path.startswith("/v1/")
    body = error_body(error, openai=openai)
    return JsonResponse(body | {"success": False, "message": str(error)}, status_code=error.status)


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    parts = [
        f"{'.'.join(str(part) for part in item['loc'] if part != 'body') or 'the body'}: {item['msg']}"
        for item in error.errors()
    ]
    return await _on_engine_error(request, InvalidRequest("; ".join(parts)))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JsonResponse(
        {"success": False, "message": message, "error": {"message": message, "code": error.status_code}},
        status_code=error.status_code,
    )
