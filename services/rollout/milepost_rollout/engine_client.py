"""Asks engines for tokens: `POST /generate` at the router, over kept-alive connections.

One request, one answer, one of these ends; nothing is retried here:

    Generation      the engine answered (also when it was cut short: `finish` is "abort")
    EngineAway      nobody to ask now: no connection, 429, 502, 503; waiting helps
    EngineRefused   400, 413, 422: this request will never be answered
    EngineFailed    any other status, an answer cut off, or rubbish; another engine may do better
    TimeoutError    the deadline passed, here or at the router (504)

With `stream` the last complete chunk is kept, unparsed, while the next ones come: when the stream breaks, its
tokens are not lost. Chunks are cumulative, so only the last one is ever parsed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import aiohttp
import orjson

from milepost.tracing import TRACEPARENT, active
from milepost.types import Int32Array
from milepost_common.peers import open_socket
from milepost_rollout.replies import Generation, RouterRecord, RubbishReply, parse_reply

KEEP_IDLE_S = 4.0
"""Shorter than what servers commonly keep (uvicorn: 5 s), so that no request meets a closing connection."""
_AWAY = frozenset({429, 502, 503})
_REFUSED = frozenset({400, 413, 422})
_DONE = b"[DONE]"
_VERSION_END = b": x-milepost-version-end:"
"""The comment by which the router ends a stream."""


class EngineAway(Exception):
    """No engine can take the request now.

    Attributes:
      answered: the router said so itself, rather than nobody answering at all.
      retry_after_s: how long it asks to wait; None where it does not say.
    """

    def __init__(self, message: str, *, answered: bool, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.answered = answered
        self.retry_after_s = retry_after_s


class EngineRefused(Exception):
    """The engine says that the request is wrong."""


class EngineFailed(Exception):
    """The engine failed at this request, or answered rubbish."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerateRequest:
    """One request to an engine; `sampling` is SGLang's dictionary, versions of 0 ask for none."""

    input_ids: Int32Array
    sampling: Mapping[str, Any]
    rid: str
    run_id: str = ""
    min_version: int = 0
    version: int = 0
    session: str = ""


class EngineClient:
    """Client of the router's `/generate`; owns a pool of connections, to be closed.

    Args:
      base_url: where the router listens for HTTP (an engine's own URL does too).
      stream: ask for streams, so that tokens survive the death of an engine.
      max_connections: most requests under way at once.
    """

    def __init__(self, base_url: str, *, stream: bool = False, max_connections: int = 0) -> None:
        self._url = f"{base_url.rstrip('/')}/generate"
        self._stream = stream
        self._max_connections = max_connections
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Closes the connections; requests under way are aborted by that."""
        if self._session is not None:
            await self._session.close()

    async def generate(self, request: GenerateRequest, *, timeout_s: float) -> Generation:
        """Asks for tokens; see the module for how this ends. Cancelling it aborts the request."""
        body = orjson.dumps(
            {
                "rid": request.rid,
                "input_ids": request.input_ids,
                "sampling_params": request.sampling,
                "return_logprob": True,
                "stream": self._stream,
            },
            option=orjson.OPT_SERIALIZE_NUMPY,
        )
        try:
            async with asyncio.timeout(timeout_s):
                return await self._post(body, _headers(request, timeout_s), request.run_id)
        except (aiohttp.ClientConnectionError, ConnectionError) as error:
            raise EngineAway(f"{self._url}: {error or type(error).__name__}", answered=False) from error
        except aiohttp.ClientError as error:
            raise EngineFailed(f"{self._url}: {type(error).__name__}: {error}") from error

    async def _post(self, body: bytes, headers: Mapping[str, str], run_id: str) -> Generation:
        async with self._open().post(self._url, data=body, headers=headers) as response:
            if response.status != 200:
                raise _failure(response, await response.read())
            record = _record(response.headers)
            try:
                if self._stream:
                    return await _last_of_stream(response, run_id, record)
                return parse_reply(await response.read(), run_id=run_id, record=record)
            except RubbishReply as error:
                raise EngineFailed(f"engine {record.engine_id or self._url}: {error}") from error

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=self._max_connections,
                keepalive_timeout=KEEP_IDLE_S,
                socket_factory=open_socket,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"content-type": "application/json"},
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


def _headers(request: GenerateRequest, timeout_s: float) -> dict[str, str]:
    headers = {"x-milepost-deadline-ms": str(int(timeout_s * 1000))}
    if request.run_id:
        headers["x-milepost-run"] = request.run_id
    if request.min_version:
        headers["x-milepost-min-version"] = str(request.min_version)
    if request.version:
        headers["x-milepost-version"] = str(request.version)
    if request.session:
        name = hashlib.blake2b(request.session.encode(), digest_size=12)  # any prompt id fits a header so
        headers["x-milepost-session"] = name.hexdigest()
    if traceparent := active():
        headers[TRACEPARENT] = traceparent
    return headers


def _record(headers: Mapping[str, str]) -> RouterRecord:
    return RouterRecord(
        version_start=_number(headers.get("x-milepost-version-start", "").encode()),
        version_end=_number(headers.get("x-milepost-version-end", "").encode()),
        engine_id=headers.get("x-milepost-engine", ""),
    )


def _number(text: bytes) -> int:
    return int(text) if text.strip().isdigit() else 0


def _failure(response: aiohttp.ClientResponse, body: bytes) -> Exception:
    message = f"{response.status}: {_message(body)}"
    if response.status in _AWAY:
        return EngineAway(message, answered=True, retry_after_s=_seconds(response.headers.get("Retry-After")))
    if response.status == 504:
        return TimeoutError(message)
    if response.status in _REFUSED:
        return EngineRefused(message)
    return EngineFailed(message)


def _message(body: bytes) -> str:
    """The text of an error body: SGLang's, OpenAI's, FastAPI's, or whatever it is."""
    try:
        value: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body[:300].decode(errors="replace")
    for _ in range(3):
        if not isinstance(value, dict):
            break
        fields = cast(dict[str, Any], value)
        inner = next((fields[k] for k in ("error", "message", "detail") if fields.get(k)), None)
        if inner is None:
            break
        value = inner
    return str(value)[:1000]


def _seconds(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


async def _last_of_stream(response: aiohttp.ClientResponse, run_id: str, record: RouterRecord) -> Generation:
    events = _Events()
    broken: Exception | None = None
    try:
        async for chunk in response.content.iter_any():
            events.feed(chunk)
    except (aiohttp.ClientError, ConnectionError) as error:
        broken = error
    if not events.last:
        raise EngineFailed(f"engine {record.engine_id}: the stream ended before the first token") from broken
    record = replace(record, version_end=events.version_end)
    generation = parse_reply(events.last, run_id=run_id, record=record)
    if events.done or generation.finish != "abort" or len(generation.output_ids):
        return generation
    raise EngineFailed(f"engine {record.engine_id}: {events.error or generation.message}") from broken


class _Events:
    """Keeps the last complete event of a stream of server-sent events, and the router's word on its end."""

    def __init__(self) -> None:
        self._rest = b""
        self.last = b""
        self.error = ""
        self.done = False
        self.version_end = 0

    def feed(self, chunk: bytes) -> None:
        """Takes bytes as they come."""
        self._rest += chunk
        *whole, self._rest = self._rest.split(b"\n\n")
        for event in whole:
            event = event.strip()
            if event.startswith(_VERSION_END):
                self.version_end = _number(event.removeprefix(_VERSION_END))
            if not event.startswith(b"data:"):  # a comment
                continue
            data = event.removeprefix(b"data:").strip()
            if data == _DONE:
                self.done = True
            elif data.startswith(b'{"error"'):
                self.error = _message(data)
            elif data:
                self.last = data
