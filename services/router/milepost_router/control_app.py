"""Control routes beside the proxy: what a person or a health check asks the router itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import orjson
from fastapi import FastAPI, Query, Response
from fastapi.responses import JSONResponse

from milepost import types as t
from milepost_router.fleet import Fleet


def create_control_app(fleet: Fleet, *, clock: Callable[[], float] = time.monotonic) -> FastAPI:
    """Builds the app.

    Args:
      fleet: the engines; only read.
      clock: the fleet's clock.
    """
    app = FastAPI(title="Milepost router", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        """200 while the router runs, with the number of engines that serve."""
        serving = sum(e.routable for e in fleet)
        return _json({"status": "ok", "serving": serving, "engines": sum(1 for _ in fleet)})

    @app.get("/engines")
    async def engines(run_id: str = Query(default="")) -> Response:
        """The fleet as ListEngines gives it."""
        now = clock()
        listed = [_plain(e.snapshot(now)) for e in fleet.of_run(run_id)]
        return _json({"engines": listed, "fleet_epoch": fleet.fleet_epoch})

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
    async def unknown(path: str) -> Response:
        """Everything else: engines' other routes are not reachable through the router."""
        message = f"/{path} is no route of the router; it passes on /generate and /v1/* alone"
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "NO_ROUTE"}
        return JSONResponse({"error": error}, status_code=404)

    del health, engines, unknown  # the app has them
    return app


def _plain(engine: t.Engine) -> dict[str, Any]:
    """An engine as JSON, its enums by name."""
    plain: dict[str, Any] = orjson.loads(orjson.dumps(engine))
    plain["state"] = engine.state.name
    if engine.capabilities is not None:
        plain["capabilities"]["transports"] = [x.name for x in engine.capabilities.transports]
    return plain


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
