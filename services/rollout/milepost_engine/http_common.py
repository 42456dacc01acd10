"""What the HTTP routes share: JSON replies, errors as SGLang shapes them, bodies, and gone clients."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from milepost_engine import spans
from milepost_engine.engine import Engine, Waiter
from milepost_engine.errors import EngineError

logger = logging.getLogger(__name__)


class JsonResponse(Response):
    """JSON through orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encodes the body."""
        return orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS)


def error_body(error: EngineError, *, openai: bool) -> dict[str, Any]:
    """SGLang's body for an error: `{"error": {"message"}}`, flat under /v1."""
    if openai:
        return {
            "object": "error",
            "message": str(error),
            "type": error.kind,
            "param": None,
            "code": error.status,
        }
    return {"error": {"message": str(error), "type": error.kind, "code": error.status}}


class GenerationEndpoint:
    """A raw ASGI endpoint that reads a JSON object and answers it; subclasses implement `handle`.

    Raw, because generation is the hot path and needs `receive` to hear that the client has gone.
    """

    openai = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        try:
            body = await Request(scope, receive).body()
            with spans.begin(scope, engine_id=self.engine.settings.engine_id):
                await self.handle(body, scope, receive, send)
        except ClientDisconnect:
            return
        except EngineError as error:
            response = JsonResponse(error_body(error, openai=self.openai), status_code=error.status)
            await response(scope, receive, send)

    async def handle(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one body. EngineErrors raised before the reply began become error replies."""
        raise NotImplementedError

    async def wait(self, waiter: Waiter, receive: Receive) -> bool:
        """Waits for a call's generations; False when the client went first (they are aborted then)."""
        if await _unless_gone(waiter.finished(), receive):
            spans.tell(waiter.generations)
            return True
        self.engine.abandon(waiter, reason="the client disconnected")
        return False

    async def stream(
        self, events: AsyncIterator[bytes], waiter: Waiter, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Sends server-sent events until they end or the client goes."""
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            if not await _unless_gone(_send_events(events, send), receive):
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            spans.tell(waiter.generations)
            self.engine.abandon(waiter, reason="the client disconnected")


async def _send_events(events: AsyncIterator[bytes], send: Send) -> None:
    async for event in events:
        await send({"type": "http.response.body", "body": event, "more_body": True})


async def _unless_gone(work: Awaitable[None], receive: Receive) -> bool:
    """Runs `work` to its end; stops it and answers False when the client disconnects first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        task.result()
        return True
    finally:
        for each in (task, gone):
            if not each.done():
                each.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await each


async def _disconnect(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"
