"""OpenAI's own Python client against the router and a real engine: replies, streams, headers, errors."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from milepost import RouterClient
from milepost.types import EngineState
from stack import READY_S, Stack, until

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
CONTEXT = 8192
CHAT: Any = {"messages": [{"role": "user", "content": "12+34"}]}
GREEDY: Any = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template, and room for a stream that takes seconds."""
    copy = tmp_path_factory.mktemp("chatty") / "tiny"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    """A client of the router, once both engines serve the first version: from then on nothing changes."""
    await stack.ready("trainer")
    await stack.ready("router")
    async with RouterClient(stack.address("router")) as router:

        async def both_serve() -> bool:
            engines = (await router.list_engines(stack.run_id)).engines
            return [e.state for e in engines] == 2 * [EngineState.SERVING]

        await until("both engines serve version 1", both_serve, within_s=READY_S)
    url = f"http://{stack.address('router', 'http')}/v1"
    async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


async def test_models_are_listed_and_an_unknown_one_is_not_found(client: AsyncOpenAI) -> None:
    (model,) = (await client.models.list()).data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "milepost")
    assert (await client.models.retrieve("tiny")).max_model_len == model.max_model_len == CONTEXT
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("gpt-17")
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "model_not_found", "model", "invalid_request_error",
    )  # fmt: skip
    assert "gpt-17" in caught.value.message
    assert "tiny" in caught.value.message


async def test_a_route_that_is_not_there(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        await client.embeddings.create(model="tiny", input="1", encoding_format="float")


async def test_a_chat_streams_what_it_answers_whole(client: AsyncOpenAI) -> None:
    how = {"model": "tiny", **CHAT, **GREEDY, "logprobs": True, "top_logprobs": 2}
    whole = await client.chat.completions.create(**how)
    (choice,) = whole.choices
    assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
    assert len(choice.message.content) == 12
    assert whole.usage.completion_tokens == 12
    assert whole.usage.prompt_tokens == len("12+34=")
    assert len(choice.logprobs.content) == 12
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)

    stream = await client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert len(chunks) > 2
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    logprobs = [entry for c in chunks if c.choices for entry in c.choices[0].logprobs.content]
    assert [e.token for e in logprobs] == [e.token for e in choice.logprobs.content]


async def test_the_sdks_stream_helper_accumulates(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="tiny", **CHAT, **GREEDY) as stream:
        deltas = [event.delta async for event in stream if event.type == "content.delta"]
        (choice,) = stream.current_completion_snapshot.choices
    assert "".join(deltas) == choice.message.content
    assert (len(choice.message.content), choice.finish_reason) == (12, "length")


async def test_completions_by_text_and_by_tokens(client: AsyncOpenAI) -> None:
    whole = await client.completions.create(model="tiny", prompt=["12+34=", "1+1="], **GREEDY, logprobs=1)
    assert [c.index for c in whole.choices] == [0, 1]
    assert [len(c.text) for c in whole.choices] == [12, 12]
    assert len(whole.choices[0].logprobs.token_logprobs) == 12
    ids = ["0123456789+=\n".index(character) for character in "12+34="]
    by_ids = await client.completions.create(model="tiny", prompt=ids, **GREEDY)
    assert by_ids.choices[0].text == whole.choices[0].text
    stream = await client.completions.create(model="tiny", prompt="12+34=", **GREEDY, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text


async def test_versions_travel_in_headers(client: AsyncOpenAI, stack: Stack) -> None:
    wanted = {"x-milepost-run": stack.run_id, "x-milepost-min-version": "1"}
    raw = await client.chat.completions.with_raw_response.create(
        model="tiny", **CHAT, **GREEDY, extra_headers=wanted
    )
    assert raw.headers["x-milepost-version-start"] == "1"
    assert raw.headers["x-milepost-version-end"] == "1"
    assert raw.headers["x-milepost-engine"] in ("engine-0", "engine-1")
    completion = raw.parse()
    assert len(completion.choices[0].message.content) == 12
    assert completion.metadata["weight_version"] == f"{stack.run_id}/1/0"

    session = {"x-milepost-session": "one"}
    engines = [
        (await client.models.with_raw_response.list(extra_headers=session)).headers["x-milepost-engine"]
        for _ in range(6)
    ]
    assert len(set(engines)) == 1

    async with client.chat.completions.with_streaming_response.create(
        model="tiny", **CHAT, **GREEDY, stream=True, extra_headers=wanted
    ) as streaming:
        assert streaming.headers["x-milepost-version-start"] == "1"
        assert "x-milepost-version-end" not in streaming.headers
        lines = [line async for line in streaming.iter_lines() if line]
    assert lines[-2:] == ["data: [DONE]", ": x-milepost-version-end: 1"]


@pytest.mark.parametrize("streams", [False, True])
async def test_no_engine_fits(client: AsyncOpenAI, streams: bool) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(
            model="tiny", **CHAT, stream=streams, extra_headers={"x-milepost-min-version": "99"}
        )
    error = caught.value
    assert isinstance(error, openai.InternalServerError)
    assert (error.status_code, error.response.headers["retry-after"]) == (503, "1")
    assert (error.code, error.type) == ("NO_ENGINE_FITS", "server_error")
    assert error.body["metadata"]["asked"] == "any run, version 99 or newer"
    assert "SERVING version 1" in error.message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 9e9}, "temperature"),
        ({"messages": []}, "messages"),
        ({"extra_headers": {"x-milepost-min-version": "new"}}, "x-milepost-min-version = 'new'"),
        ({"extra_headers": {"x-milepost-versoin": "1"}}, "x-milepost-versoin"),
        ({"messages": [{"role": "user", "content": "1" * CONTEXT}]}, str(CONTEXT)),
    ],
)
async def test_bad_requests_are_named(client: AsyncOpenAI, change: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**{"model": "tiny", **CHAT, **change})
    assert named in caught.value.message
    assert caught.value.body["message"] in caught.value.message
    assert "retry-after" not in caught.value.response.headers


async def test_a_deadline_of_the_caller(client: AsyncOpenAI) -> None:
    long: Any = {"max_tokens": CONTEXT - 100, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(
            model="tiny", **CHAT, **long, extra_headers={"x-milepost-deadline-ms": "50"}
        )
    assert (caught.value.status_code, caught.value.code) == (504, "DEADLINE_EXCEEDED")


async def test_a_stream_whose_engine_dies_ends_with_an_error(client: AsyncOpenAI, stack: Stack) -> None:
    """The last test: it leaves one engine fewer for a while."""
    long: Any = {"max_tokens": CONTEXT - 100, "extra_body": {"ignore_eos": True}}
    raw = await client.chat.completions.with_raw_response.create(model="tiny", **CHAT, **long, stream=True)
    engine = raw.headers["x-milepost-engine"]
    texts: list[str] = []

    async def read_and_kill() -> None:
        async for chunk in raw.parse():
            if not texts:
                os.kill(stack.service(engine)["pid"], signal.SIGKILL)
            texts.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError) as caught:
        await asyncio.wait_for(read_and_kill(), 60)
    assert caught.value.code == "STREAM_BROKE"
    assert "go on from the tokens that came" in caught.value.message
    assert len("".join(texts)) < CONTEXT - 100
    again = await client.with_options(max_retries=4).chat.completions.create(model="tiny", **CHAT, **GREEDY)
    assert len(again.choices[0].message.content) == 12
