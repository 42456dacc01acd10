"""Conformance: what surrounds weight updates: flushes, live requests, versions, spans, sessions, checks."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
import torch

from moments import caught

NORM = "model.norm.weight"


def _only_ours(client, reason):
    if not client.engine.ours:
        pytest.skip(reason)


# ---- flush and abort around updates ------------------------------------------------------------------------


async def test_an_update_that_would_flush_fails_with_live_requests(every_client, reference, model_dir, ids):
    client = every_client
    _only_ours(client, "SGLang asserts after it has written the weights, and dies")
    before = await client.checksum()
    stream = await client.start_stream(ids("1="), **client.engine.long)
    body = {"model_path": str(model_dir)}  # flush_cache is true when absent
    async with client.updating():
        refused = await client.post("/update_weights_from_disk", body, status=400)
        assert "flush_cache" in refused["message"]
        assert await client.checksum() == before
        await client.post("/update_weights_from_disk", body | {"flush_cache": False})
        assert stream.last["meta_info"]["finish_reason"] is None
        await client.post("/update_weights_from_disk", body | {"abort_all_requests": True})
    assert (await stream.finished())["meta_info"]["finish_reason"]["type"] == "abort"


async def test_requests_in_flight_go_on_over_an_update(client, reference, ids, tmp_path, weights_put_back):
    """Retract, update, continue: the tokens after the update are those of the new weights."""
    prompt = ids("1+2=")
    sampling = {**client.engine.long, "max_new_tokens": 900}
    stream = await client.held_stream(prompt, mode="retract", after=5, **sampling)
    async with client.updating():
        reference.load(reference.perturbed(9))
        await asyncio.to_thread(reference.model.save_pretrained, tmp_path)
        body = {"model_path": str(tmp_path), "flush_cache": False, "weight_version": "after"}
        await client.post("/update_weights_from_disk", body)
    await client.post("/continue_generation")
    last = await stream.finished()
    output = last["output_ids"]
    logprobs = [entry[0] for entry in last["meta_info"]["output_token_logprobs"]]
    assert len(output) == 900
    expected = reference.logprobs(prompt, output)  # the reference holds the new weights
    assert logprobs[:5] != pytest.approx(expected[:5], abs=client.engine.tolerance)
    if client.engine.has_spans:
        first, second = last["meta_info"]["weight_versions"]
        assert (first["version"], second["version"]) == ("default", "after")
        cut = second["start"]
        assert 5 <= cut < 900
        assert logprobs[cut:] == pytest.approx(expected[cut:], abs=client.engine.tolerance)
        assert logprobs[:cut] != pytest.approx(expected[:cut], abs=client.engine.tolerance)
    else:
        assert logprobs[-100:] == pytest.approx(expected[-100:], abs=client.engine.tolerance)


# ---- versions ----------------------------------------------------------------------------------------------


async def test_spans_name_the_version_of_every_token(every_client, ids):
    client = every_client

    async def through_versions():
        await _name(client, "default")
        sampling = {**client.engine.long, "max_new_tokens": 900}
        if client.engine.ours:
            stream = await client.held_stream(ids("1="), mode="in_place", after=2, **sampling)
        else:
            stream = await client.start_stream(ids("1="), after=2, **sampling)
        for version in ("v1", "v1", "v2"):
            await _name(client, version)
            await _two_more(client, stream)
        await client.post("/continue_generation")
        return stream

    stream = await caught("a generation under three versions", through_versions)
    meta = (await stream.finished())["meta_info"]
    fresh = await client.generate(ids("1="), max_new_tokens=3, ignore_eos=True)
    await _name(client, "default")
    assert meta["weight_version"] == "v2"
    assert fresh["meta_info"]["weight_version"] == "v2"
    if not client.engine.has_spans:
        assert "weight_versions" not in meta
        return
    spans = meta["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "v1", "v2"]
    assert spans[0]["start"] == 0
    assert spans[-1]["end"] == 900
    assert all(a["end"] == b["start"] for a, b in pairwise(spans))
    assert fresh["meta_info"]["weight_versions"] == [{"version": "v2", "start": 0, "end": 3}]


async def _name(client, version):
    await client.post("/update_weight_version", {"new_version": version, "abort_all_requests": False})


async def _two_more(client, stream):
    """Lets a held generation go on for two tokens or more, and holds it again.

    SGLang counts at prefills alone, so there what was read of the stream has to do.
    """
    if not client.engine.ours:
        await stream.tokens(min(len(stream.last["output_ids"]) + 2, 900))
        return
    before = await client.tokens_generated()
    await client.post("/continue_generation")

    async def made():
        return await client.tokens_generated() >= before + 2 or not await client.num_live()

    await client.until(made)
    await client.hold(stream, mode="in_place")


async def test_update_weight_version_aborts_unless_told_otherwise(client, ids):
    stream = await client.start_stream(ids("1="), **client.engine.long)
    reply = await client.post("/update_weight_version", {"new_version": "default"})
    assert reply["success"] is True
    assert reply["new_version"] == "default"
    assert (await stream.finished())["meta_info"]["finish_reason"]["type"] == "abort"


async def test_an_update_can_carry_the_version(client, model_dir, weights_put_back):
    async with client.updating():
        body = {"model_path": str(model_dir), "flush_cache": False, "weight_version": "run/7/3"}
        await client.post("/update_weights_from_disk", body)
    assert (await client.get("/model_info"))["weight_version"] == "run/7/3"


async def test_updates_belong_in_a_session_where_the_release_has_them(every_client, model_dir):
    client = every_client
    body = {"model_path": str(model_dir), "flush_cache": False}
    if not client.engine.has_sessions:
        for path in ("/begin_weight_update", "/end_weight_update"):
            assert (await client.http.post(path, json={})).status_code == 404
        await client.post("/update_weights_from_disk", body)
        return
    _only_ours(client, "SGLang asserts, and dies, on an update outside a session")
    refused = await client.post("/update_weights_from_disk", body, status=400)
    assert "/begin_weight_update" in refused["message"]
    await client.post("/end_weight_update", status=400)
    await client.post("/begin_weight_update", {"selector": "all"})
    await client.post("/begin_weight_update", status=400)
    await client.post("/update_weights_from_disk", body)
    await client.post("/end_weight_update")
    await client.post("/update_weights_from_disk", body, status=400)


# ---- reading weights ---------------------------------------------------------------------------------------


async def test_get_weights_by_name(client, reference):
    if not client.engine.ours:
        pytest.skip("SGLang reads weights by name of a few models only, Qwen3 not among them")
    state = reference.state()
    got = await client.post("/get_weights_by_name", {"name": NORM, "truncate_size": 5})
    assert got == pytest.approx(state[NORM][:5].tolist(), abs=client.engine.tolerance)
    name = "model.embed_tokens.weight"
    rows = await client.post("/get_weights_by_name", {"name": name, "truncate_size": 2})
    assert torch.tensor(rows).allclose(state[name][:2], atol=client.engine.tolerance)
    await client.post("/get_weights_by_name", {"name": "no.such.weight"}, status=400)


async def test_weights_checker_finds_a_changed_tensor(client, weights_put_back):
    await client.post("/weights_checker", {"action": "snapshot"})
    await client.post("/weights_checker", {"action": "compare"})
    before = await client.checksum()
    assert await client.checksum() == before
    await client.post("/weights_checker", {"action": "reset_tensors"})
    assert await client.checksum() != before
    differs = await client.post("/weights_checker", {"action": "compare"}, status=400)
    assert differs["success"] is False
    await client.post("/weights_checker", {"action": "dance"}, status=400)


async def test_checksums_name_every_tensor(client, reference):
    reply = await client.post("/weights_checker", {"action": "checksum"})
    (rank,) = reply["ranks"]
    if client.engine.ours:
        assert set(rank["checksums"]) == set(reference.state())
    assert len(rank["per_gpu_checksum"]) == 64


async def test_a_list_of_tensors_is_compared_with_the_model(client, reference):
    if not client.engine.ours:
        pytest.skip("SGLang cannot be asked")

    def body(state):
        return {
            "action": "fits",
            "names": list(state),
            "dtypes": ["bfloat16"] * len(state),
            "shapes": [list(tensor.shape) for tensor in state.values()],
        }

    whole = reference.state()
    await client.post("/weights_checker", body(whole))
    name = next(iter(whole))
    lacking = await client.post(
        "/weights_checker", body({k: v for k, v in whole.items() if k != name}), status=400
    )
    assert f"1 tensors of the model are missing, '{name}'" in lacking["message"]
    other = await client.post("/weights_checker", body(whole | {name: whole[name][:-1]}), status=400)
    assert name in other["message"]
    assert "shape" in other["message"]
