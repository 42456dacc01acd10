"""Conformance: /v1 completions, chat completions and models."""

from __future__ import annotations

import pytest

MESSAGES = [{"role": "user", "content": "1+2"}]


async def test_models(client):
    listing = await client.get("/v1/models")
    (model,) = listing["data"]
    assert listing["object"] == "list"
    served = await client.get("/server_info")  # SGLang names itself after the last folder that it loaded
    assert model["id"] == served["served_model_name"]
    assert model["object"] == "model"


async def test_completion_equals_generate(client, reference, ids):
    plain = await client.post(
        "/generate",
        {"text": "1+2=", "sampling_params": {"max_new_tokens": 9, "temperature": 0.0, "ignore_eos": True}},
    )
    body = {
        "model": "tiny",
        "prompt": "1+2=",
        "max_tokens": 9,
        "temperature": 0.0,
        "ignore_eos": True,
        "logprobs": 1,
    }
    reply = await client.post("/v1/completions", body)
    (choice,) = reply["choices"]
    assert reply["object"] == "text_completion"
    assert choice["text"] == plain["text"]
    assert choice["finish_reason"] == "length"
    assert reply["usage"]["prompt_tokens"] == 4
    assert reply["usage"]["completion_tokens"] == 9
    assert reply["usage"]["total_tokens"] == 13
    expected = reference.logprobs(ids("1+2="), plain["output_ids"])
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=client.engine.tolerance)


async def test_completion_takes_several_prompts_tokens_and_n(client, ids):
    body = {"model": "tiny", "prompt": ["1+1=", "2+2="], "max_tokens": 5, "n": 2, "temperature": 1.0}
    reply = await client.post("/v1/completions", body)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert reply["usage"]["prompt_tokens"] == 8
    greedy = {"model": "tiny", "max_tokens": 5, "temperature": 0.0}
    by_text = await client.post("/v1/completions", {**greedy, "prompt": "1+1="})
    by_ids = await client.post("/v1/completions", {**greedy, "prompt": ids("1+1=")})
    assert by_ids["choices"][0]["text"] == by_text["choices"][0]["text"]


async def test_chat_renders_the_template(client, ids):
    """The template of the suite's tokenizer turns the conversation into "1+2\\n="."""
    if not client.engine.ours:
        pytest.skip("the given model has a chat template of its own")
    greedy = {"max_tokens": 7, "temperature": 0.0, "ignore_eos": True}
    reply = await client.post("/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, **greedy})
    plain = await client.generate(ids("1+2\n="), max_new_tokens=7, temperature=0.0, ignore_eos=True)
    (choice,) = reply["choices"]
    assert reply["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": plain["text"]}
    assert choice["finish_reason"] == "length"
    assert reply["usage"]["prompt_tokens"] == 5


async def test_chat_logprobs_stop_and_seed(client, ids):
    if not client.engine.draws_by_seed:
        pytest.skip("SGLang draws by seed under --enable-deterministic-inference alone")
    body = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 40,
        "temperature": 1.0,
        "ignore_eos": True,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 2,
    }
    reply = await client.post("/v1/chat/completions", body)
    again = await client.post("/v1/chat/completions", body)
    text = reply["choices"][0]["message"]["content"]
    assert again["choices"][0]["message"]["content"] == text
    content = reply["choices"][0]["logprobs"]["content"]
    assert len(content) == 40
    for entry in content:
        assert len(entry["top_logprobs"]) == 2
        assert entry["logprob"] <= entry["top_logprobs"][0]["logprob"] + 1e-6
    stop = text[10]
    stopped = await client.post("/v1/chat/completions", {**body, "stop": stop})
    choice = stopped["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["matched_stop"] == stop
    assert choice["message"]["content"] == text[: text.index(stop)]


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
async def test_streams_add_up_to_the_plain_reply(client, route):
    body = {"model": "tiny", "max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    body |= {"prompt": "1+2="} if route == "/v1/completions" else {"messages": MESSAGES}
    plain = await client.post(route, body)
    options = {"stream_options": {"include_usage": True}}
    events = [event async for event in client.events(route, {**body, **options})]
    usage = events[-1]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    choices = [event["choices"][0] for event in events if event["choices"]]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    if route == "/v1/completions":
        assert "".join(choice["text"] for choice in choices) == plain["choices"][0]["text"]
    else:
        assert choices[0]["delta"]["role"] == "assistant"
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        assert text == plain["choices"][0]["message"]["content"]


async def test_weight_version_is_in_the_metadata(client):
    body = {"model": "tiny", "prompt": "1", "max_tokens": 3, "ignore_eos": True}
    metadata = (await client.post("/v1/completions", body))["metadata"]
    assert metadata["weight_version"] == "default"
    if client.engine.has_spans:
        assert metadata["weight_versions"] == [{"version": "default", "start": 0, "end": 3}]


@pytest.mark.parametrize(
    "route, body, named",
    [
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/chat/completions", {"messages": "hello"}, "messages"),
        ("/v1/chat/completions", {"messages": MESSAGES, "temperature": "hot"}, "temperature"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": "1", "max_tokens": -1}, "max_new_tokens"),
    ],
)
async def test_bad_bodies_are_refused_by_name(client, route, body, named):
    if not client.engine.ours:
        pytest.skip("SGLang's messages are those of its own validators")
    reply = await client.http.post(route, json={"model": "tiny", **body})
    assert reply.status_code == 400
    assert reply.json()["object"] == "error"
    assert named in reply.json()["message"]
