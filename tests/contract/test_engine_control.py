"""Conformance: abort, disconnect, pause and continue, flush, memory."""

from __future__ import annotations

import asyncio

import pytest


def _ended_by_abort(reply):
    return reply["meta_info"]["finish_reason"]["type"] == "abort"


async def test_abort_ends_a_request_and_keeps_its_tokens(client, reference, ids):
    prompt = ids("1+2=")
    body = {
        "input_ids": prompt,
        "sampling_params": client.engine.long,
        "return_logprob": True,
        "rid": "to-abort",
    }
    task = asyncio.create_task(client.post("/generate", body))
    await client.until(_generating(client))
    await client.post("/abort_request", {"rid": "to-abort"})
    reply = await task
    assert _ended_by_abort(reply)
    assert len(reply["output_ids"]) < client.engine.long["max_new_tokens"]
    logprobs = [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]
    expected = reference.logprobs(prompt, reply["output_ids"])
    assert logprobs == pytest.approx(expected, abs=client.engine.tolerance)


async def test_abort_matches_prefixes_and_leaves_others(client, ids):
    if not client.engine.ours:
        pytest.skip(
            "SGLang with one tokenizer process aborts by whole names: a prefix of some is passed over"
        )
    spared = await client.start_stream(ids("22="), **client.engine.long)
    body = {"input_ids": [ids("1="), ids("2=")], "sampling_params": client.engine.long, "rid": "family"}
    task = asyncio.create_task(client.post("/generate", body))
    await client.until(_live(client, 3))
    await client.post("/abort_request", {"rid": "family"})
    assert all(_ended_by_abort(reply) for reply in await task)
    assert await client.num_live() == 1
    generated = await client.tokens_generated()

    async def goes_on():
        return await client.tokens_generated() >= generated + 10

    await client.until(goes_on)
    await client.post("/abort_request", {"abort_all": True})
    assert _ended_by_abort(await spared.finished())


async def test_abort_all_ends_streams_too(client, ids):
    streams = [await client.start_stream(ids(text), **client.engine.long) for text in ("1=", "ab", "77")]
    await client.post("/abort_request", {"abort_all": True})
    for stream in streams:
        last = await stream.finished()
        assert _ended_by_abort(last)
        assert len(last["output_ids"]) >= 1


async def test_a_client_that_hangs_up_frees_its_place(client, ids):
    stream = await client.start_stream(ids("1="), **client.engine.long)
    await client.until(_live(client, 1))
    await stream.hang_up()
    await client.until(_live(client, 0))


async def test_a_client_that_hangs_up_before_its_reply_frees_its_place(client, ids):
    body = {"input_ids": ids("3="), "sampling_params": client.engine.long}
    task = asyncio.create_task(client.post("/generate", body))
    await client.until(_live(client, 1))
    task.cancel()
    await asyncio.wait([task])
    await client.until(_live(client, 0))


async def test_abort_of_an_unknown_request_is_no_error(client):
    await client.post("/abort_request", {"rid": "nobody"})


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_pause_holds_requests_and_continue_finishes_them_as_if_nothing_had_been(
    client, reference, ids, mode
):
    """Greedy output with a pause in its middle equals the one without; so do the log-probs.

    SGLang's prefill rounds otherwise than its decoding, so there the forward pass judges what came out.
    """
    prompt, params = ids("31+4="), {**client.engine.long, "max_new_tokens": 600}
    undisturbed = await client.generate(prompt, **params)
    stream = await client.held_stream(prompt, mode=mode, after=3, **params)
    held = len(stream.last["output_ids"])
    newcomer = asyncio.create_task(client.generate(ids("8="), max_new_tokens=4, temperature=0.0))
    await _arrived(client, 2)
    assert not newcomer.done()
    assert stream.last["meta_info"]["finish_reason"] is None
    await client.post("/continue_generation")
    last = await stream.finished()
    assert 3 <= held <= 600
    if client.engine.ours:
        assert last["output_ids"] == undisturbed["output_ids"]
    assert len(last["output_ids"]) == len(undisturbed["output_ids"])
    assert [entry[0] for entry in last["meta_info"]["output_token_logprobs"]] == pytest.approx(
        reference.logprobs(prompt, last["output_ids"]), abs=client.engine.tolerance
    )
    assert (await newcomer)["meta_info"]["completion_tokens"] == 4


async def test_pause_with_abort_ends_what_runs_and_holds_what_comes(client, ids):
    stream = await client.start_stream(ids("1="), **client.engine.long)
    await client.post("/pause_generation", {"mode": "abort"})
    assert _ended_by_abort(await stream.finished())
    newcomer = asyncio.create_task(client.generate(ids("8="), max_new_tokens=4, temperature=0.0))
    await _arrived(client, 1)
    assert not newcomer.done()
    await client.post("/continue_generation")
    assert (await newcomer)["meta_info"]["completion_tokens"] >= 1


async def test_a_paused_request_can_be_aborted(client, ids):
    for mode in ("in_place", "retract"):
        stream = await client.start_stream(ids("1="), **client.engine.long)
        await client.post("/pause_generation", {"mode": mode})
        await client.post("/abort_request", {"abort_all": True})
        if mode == "in_place" and not client.engine.ours:  # SGLang ends it at its next forward pass
            await client.post("/continue_generation")
        assert _ended_by_abort(await stream.finished())
        await client.post("/continue_generation")


async def test_a_paused_engine_is_healthy(client):
    """SGLang's /health generates a token, so what its scheduler answers is the sign of life there."""
    await client.post("/pause_generation", {"mode": "in_place"})
    if client.engine.ours:
        assert (await client.http.get("/health")).status_code == 200
        assert (await client.http.get("/health_generate")).status_code == 200
    assert (await client.http.get("/server_info")).status_code == 200
    await client.post("/continue_generation")


async def test_unknown_pause_mode_is_refused(client):
    reply = await client.http.post("/pause_generation", json={"mode": "sleep"})
    assert reply.status_code in (400, 422)
    assert "mode" in reply.text


async def test_flush_fails_while_requests_hold_kv(every_client, ids):
    client = every_client
    await client.at_rest()
    stream = await client.start_stream(ids("1="), **client.engine.long)
    refused = await client.http.post("/flush_cache")
    assert refused.status_code == 400
    await client.post("/pause_generation", {"mode": "in_place"})
    assert (await client.http.post("/flush_cache")).status_code == 400
    await client.post("/pause_generation", {"mode": "retract"})
    if (
        client.engine.ours
    ):  # SGLang's flush looks at its waiting queue in some releases, at the pause in others
        assert (await client.http.post("/flush_cache")).status_code == 200
    await client.post("/abort_request", {"abort_all": True})
    await stream.finished()
    await client.post("/continue_generation")
    await client.at_rest()


async def test_memory_release_needs_rest_and_generation_needs_memory(
    client, ids, weights_put_back, model_dir
):
    if not client.engine.ours:
        pytest.skip("SGLang asserts, and dies, on a release with live requests or a request while released")
    before = await client.checksum()
    stream = await client.start_stream(ids("1="), **client.engine.long)
    refused = await client.http.post("/release_memory_occupation", json={})
    assert refused.status_code == 400
    assert "running" in refused.text or "run" in refused.text
    await client.post("/abort_request", {"abort_all": True})
    await stream.finished()
    await client.post("/release_memory_occupation", {"tags": ["kv_cache", "weights"]})
    state = (await client.get("/server_info"))["internal_states"][0]
    assert state["kv_cache_bytes"] == 0
    assert state["weights_bytes"] == 0
    for tag in ("weights", "kv_cache"):
        reply = await client.http.post("/generate", json={"input_ids": ids("1")})
        assert reply.status_code == 503
        assert "resume_memory_occupation" in reply.text
        await client.post("/resume_memory_occupation", {"tags": [tag]})
    empty = await client.http.post("/generate", json={"input_ids": ids("1")})
    assert empty.status_code == 503
    assert "weights" in empty.text
    async with client.updating():
        await client.post("/update_weights_from_disk", {"model_path": str(model_dir), "flush_cache": False})
    assert await client.checksum() == before
    assert (await client.generate(ids("1"), max_new_tokens=2))["output_ids"]


async def test_kv_cache_alone_can_be_released(client, ids):
    prompt = ids("5+5=")
    before = await client.generate(prompt, max_new_tokens=8, temperature=0.0)
    await client.at_rest()  # SGLang dies of a release in mid-work
    await client.post("/release_memory_occupation", {"tags": ["kv_cache"]})
    await client.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
    after = await client.generate(prompt, max_new_tokens=8, temperature=0.0)
    assert after["output_ids"] == before["output_ids"]


async def test_memory_is_released_once_and_resumed_once(client):
    if not client.engine.ours:
        pytest.skip("SGLang dies of a second release, and of a resume of what was not released")
    await client.at_rest()
    for path, why in (("resume", "was not released (kv_cache)"), ("release", ""), ("release", "already")):
        reply = await client.http.post(f"/{path}_memory_occupation", json={"tags": ["kv_cache"]})
        assert (reply.status_code, why in reply.text) == (400 if why else 200, True), reply.text
    reply = await client.http.post("/resume_memory_occupation", json={"tags": ["kv_cache", "weights"]})
    assert reply.status_code == 400
    assert "was not released (weights)" in reply.text
    await client.post("/resume_memory_occupation", {"tags": ["kv_cache"]})


async def test_unknown_memory_tag_is_refused(client):
    if not client.engine.ours:
        pytest.skip("SGLang ignores tags it does not know")
    reply = await client.http.post("/release_memory_occupation", json={"tags": ["cuda_graphs"]})
    assert reply.status_code == 400
    assert "cuda_graphs" in reply.text


def _live(client, count):
    async def check():
        return await client.num_live() == count

    return check


async def _arrived(client, count):
    """Waits until `count` are there; SGLang keeps what comes during a pause where nobody counts it."""
    if client.engine.ours:
        await client.until(_live(client, count))


def _generating(client):
    async def check():
        if not client.engine.ours:
            return await client.num_live() >= 1
        state = (await client.get("/server_info"))["internal_states"][0]
        return state["num_running_reqs"] >= 1 and state["tokens_generated"] >= 1

    return check


@pytest.mark.parametrize(
    "path",
    [
        "/abort_request",
        "/pause_generation",
        "/init_weights_update_group",
        "/destroy_weights_update_group",
        "/update_weights_from_distributed",
        "/update_weights_from_tensor",
        "/update_weights_from_disk",
        "/update_weight_version",
        "/weights_checker",
        "/get_weights_by_name",
        "/release_memory_occupation",
        "/resume_memory_occupation",
    ],
)
@pytest.mark.parametrize(
    "body", [b"{not json", b"[1]", b'{"mode": 1, "rid": 1, "tags": 3, "name": [], "action": 7}']
)
async def test_rubbish_on_control_routes_is_a_400(client, ids, path, body):
    if not client.engine.ours:
        pytest.skip("the statuses and words for malformed bodies are those of SGLang's own validators")
    reply = await client.http.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert reply.json()["success"] is False
    assert reply.json()["message"]
    assert len((await client.generate(ids("1"), max_new_tokens=2, ignore_eos=True))["output_ids"]) == 2


async def test_unknown_routes_and_methods_are_named(client):
    missing = await client.http.post("/no_such_route", json={})
    assert missing.status_code == 404
    assert "/no_such_route" in missing.text or not client.engine.ours
    assert (await client.http.get("/generate")).status_code in (404, 405)
