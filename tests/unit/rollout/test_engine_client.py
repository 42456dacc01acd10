"""The HTTP side: how each kind of answer ends, streams that break, and requests that are given up."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import orjson
import pytest
from aiohttp import web

from loop_clock import skip
from milepost_rollout.engine_client import (
    EngineAway,
    EngineClient,
    EngineFailed,
    EngineRefused,
    GenerateRequest,
)

REQUEST = GenerateRequest(
    input_ids=np.array([1, 2], np.int32),
    sampling={"max_new_tokens": 4},
    rid="g-1",
    run_id="r",
    min_version=6,
    session="söme/prompt\n1",
)


async def generate(
    engine: Any, *, stream: bool = False, timeout_s: float = 60.0, request: GenerateRequest = REQUEST
):
    client = EngineClient(engine.url, stream=stream)
    try:
        return await client.generate(request, timeout_s=timeout_s)
    finally:
        await client.close()


async def test_what_is_sent_and_what_comes_back(engine: Any):
    async def answer(request: web.Request, body: dict[str, Any]) -> web.Response:
        headers = {"x-milepost-engine": "e3", "x-milepost-version-start": "6", "x-milepost-version-end": "7"}
        return web.json_response(engine.reply([5, 6]), headers=headers)

    engine.answer = answer
    generation = await generate(engine)
    assert generation.output_ids.tolist() == [5, 6]
    assert generation.engine_id == "e3"
    assert [(s.weight_version) for s in generation.spans] == [6, 7]
    (body,) = engine.requests
    assert body == {
        "rid": "g-1",
        "input_ids": [1, 2],
        "sampling_params": {"max_new_tokens": 4},
        "return_logprob": True,
        "stream": False,
    }
    (headers,) = engine.headers
    assert headers["x-milepost-run"] == "r"
    assert headers["x-milepost-min-version"] == "6"
    assert "x-milepost-version" not in headers
    assert headers["x-milepost-deadline-ms"] == "60000"
    assert headers["x-milepost-session"].isalnum()


@pytest.mark.parametrize(
    "status, kind, body, said",
    [
        (400, EngineRefused, '{"error": {"message": "too long"}}', "400: too long"),
        (422, EngineRefused, '{"detail": "no such field"}', "422: no such field"),
        (503, EngineAway, '{"message": "none fits"}', "503: none fits"),
        (502, EngineAway, "gone", "502: gone"),
        (429, EngineAway, "", "429"),
        (500, EngineFailed, '{"error": "boom"}', "500: boom"),
        (404, EngineFailed, "[]", "404"),
        (504, TimeoutError, "late", "504: late"),
    ],
)
async def test_each_status_has_its_kind(
    engine: Any, status: int, kind: type[Exception], body: str, said: str
):
    async def answer(request: web.Request, asked: dict[str, Any]) -> web.Response:
        return web.Response(status=status, text=body, headers={"Retry-After": "0.5"})

    engine.answer = answer
    with pytest.raises(kind, match=said) as caught:
        await generate(engine)
    if isinstance(caught.value, EngineAway):
        assert caught.value.answered
        assert caught.value.retry_after_s == 0.5


async def test_rubbish_names_the_field(engine: Any):
    async def answer(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.json_response({"output_ids": [1], "meta_info": {"finish_reason": {"type": "stop"}}})

    engine.answer = answer
    with pytest.raises(EngineFailed, match="output_token_logprobs has 0 entries for 1 output_ids"):
        await generate(engine)


async def test_nobody_listens():
    client = EngineClient("http://127.0.0.1:9")
    with pytest.raises(EngineAway) as caught:
        await client.generate(REQUEST, timeout_s=10.0)
    await client.close()
    assert not caught.value.answered


async def test_the_deadline_passes(engine: Any):
    arrived = asyncio.Event()

    async def answer(request: web.Request, body: dict[str, Any]) -> web.Response:
        arrived.set()
        await asyncio.Event().wait()
        raise AssertionError

    engine.answer = answer
    task = asyncio.create_task(generate(engine, timeout_s=60.0))
    await asyncio.wait_for(arrived.wait(), 30)
    skip(60.0)
    with pytest.raises(TimeoutError):
        await task
    await asyncio.wait_for(engine.disconnected.wait(), 30)


async def test_cancelling_aborts_the_request(engine: Any):
    arrived = asyncio.Event()

    async def answer(request: web.Request, body: dict[str, Any]) -> web.Response:
        arrived.set()
        await asyncio.Event().wait()
        raise AssertionError

    engine.answer = answer
    task = asyncio.create_task(generate(engine))
    await asyncio.wait_for(arrived.wait(), 30)
    task.cancel()
    await asyncio.wait_for(engine.disconnected.wait(), 30)
    with pytest.raises(asyncio.CancelledError):
        await task


def chunk(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def streaming(*pieces: bytes, cut: bool = False):
    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert body["stream"] is True
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if cut:
            assert request.transport is not None
            await response.drain()
            request.transport.close()
        return response

    return answer


UNFINISHED = {"finish_reason": None}


async def test_a_stream_to_its_end(engine: Any):
    first, last = chunk(engine.reply([5], **UNFINISHED)), chunk(engine.reply([5, 6]))
    whole = first + last + b"data: [DONE]\n\n: x-milepost-version-end: 9\n\n"
    engine.answer = streaming(whole[:30], whole[30:75], whole[75:])
    generation = await generate(engine, stream=True)
    assert generation.output_ids.tolist() == [5, 6]
    assert generation.finish == "stop"
    assert generation.spans[-1].weight_version == 9


async def test_a_stream_that_breaks_keeps_its_tokens(engine: Any):
    broken = chunk(engine.reply([5, 6, 7], **UNFINISHED))[:-10]
    engine.answer = streaming(
        chunk(engine.reply([5], **UNFINISHED)), chunk(engine.reply([5, 6], **UNFINISHED)), broken, cut=True
    )
    generation = await generate(engine, stream=True)
    assert generation.output_ids.tolist() == [5, 6]
    assert generation.finish == "abort"


async def test_a_stream_that_ends_with_an_error_keeps_its_tokens(engine: Any):
    error = chunk({"error": {"message": "engine died"}})
    engine.answer = streaming(chunk(engine.reply([5], **UNFINISHED)), error)
    generation = await generate(engine, stream=True)
    assert generation.output_ids.tolist() == [5]
    assert generation.finish == "abort"


async def test_a_stream_without_a_token_is_a_failure(engine: Any):
    engine.answer = streaming(cut=True)
    with pytest.raises(EngineFailed, match="before the first token"):
        await generate(engine, stream=True)
