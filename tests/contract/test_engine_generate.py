"""Conformance: /generate. Log-probs are judged by a plain forward pass of the same weights, made here."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def _logprobs(reply):
    return [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]


async def test_reply_has_sglangs_shape(client, ids):
    reply = await client.post(
        "/generate",
        {"text": "1+2=", "sampling_params": {"max_new_tokens": 5, **GREEDY}, "rid": "shape-1"},
    )
    meta = reply["meta_info"]
    assert meta["id"] == "shape-1"
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (4, 5)
    assert meta["cached_tokens"] >= 0
    assert isinstance(meta["weight_version"], str)
    assert len(reply["output_ids"]) == 5
    assert isinstance(reply["text"], str)
    assert "output_token_logprobs" not in meta


async def test_text_and_input_ids_are_the_same_prompt(client, ids):
    params = {"max_new_tokens": 8, **GREEDY}
    by_text = await client.post("/generate", {"text": "12+34=", "sampling_params": params})
    by_ids = await client.post("/generate", {"input_ids": ids("12+34="), "sampling_params": params})
    assert by_text["output_ids"] == by_ids["output_ids"]
    assert by_text["text"] == by_ids["text"]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
async def test_logprobs_are_those_of_the_tempered_distribution(client, reference, ids, temperature):
    prompt = ids("3+4=7\n5+5=")
    reply = await client.generate(prompt, max_new_tokens=24, temperature=temperature, ignore_eos=True)
    expected = reference.logprobs(prompt, reply["output_ids"], temperature=temperature)
    tolerance = client.engine.tolerance / min(temperature, 1.0)  # logits are what is rounded
    assert _logprobs(reply) == pytest.approx(expected, abs=tolerance)
    errors = [abs(got - right) for got, right in zip(_logprobs(reply), expected, strict=True)]
    assert sum(errors) / len(errors) < tolerance / 2
    assert [entry[1] for entry in reply["meta_info"]["output_token_logprobs"]] == reply["output_ids"]


async def test_logprobs_are_taken_before_top_p_and_top_k(client, reference, ids):
    prompt = ids("abc")
    reply = await client.generate(
        prompt, max_new_tokens=24, temperature=1.0, top_k=3, top_p=0.6, ignore_eos=True
    )
    expected = reference.logprobs(prompt, reply["output_ids"])
    assert _logprobs(reply) == pytest.approx(expected, abs=client.engine.tolerance)


async def test_greedy_takes_the_best_token_and_reports_it_at_temperature_one(client, reference, ids):
    prompt = ids("2+2=")
    reply = await client.post(
        "/generate",
        {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 12, **GREEDY},
            "return_logprob": True,
            "top_logprobs_num": 3,
        },
    )
    expected = reference.logprobs(prompt, reply["output_ids"])
    assert _logprobs(reply) == pytest.approx(expected, abs=client.engine.tolerance)
    for entry, top in zip(
        reply["meta_info"]["output_token_logprobs"], reply["meta_info"]["output_top_logprobs"], strict=True
    ):
        assert len(top) == 3
        assert top[0][:2] == entry[:2]
        assert top[0][0] >= top[1][0] >= top[2][0]


async def test_prompt_logprobs(client, reference, ids):
    prompt = ids("10+20=30+")  # without the vocabulary's last token, whose id SGLang tells as 0
    reply = await client.post(
        "/generate",
        {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 2, **GREEDY},
            "return_logprob": True,
            "logprob_start_len": 0,
        },
    )
    entries = reply["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in entries] == prompt
    assert entries[0][0] is None
    expected = reference.logprobs(prompt[:1], prompt[1:])
    assert [entry[0] for entry in entries[1:]] == pytest.approx(expected, abs=client.engine.tolerance)


async def test_token_texts_in_logprobs(client, ids):
    reply = await client.post(
        "/generate",
        {
            "input_ids": ids("1+1="),
            "sampling_params": {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True},
            "return_logprob": True,
            "return_text_in_logprobs": True,
        },
    )
    texts = [entry[2] for entry in reply["meta_info"]["output_token_logprobs"]]
    assert all(isinstance(text, str) for text in texts)


async def test_many_requests_at_once_do_not_disturb_one_another(client, reference, ids):
    """Rows of unequal length come and go in one batch; every row still matches its own forward pass."""
    prompts = [
        ids(text) for text in ("1", "12+3=", "a", "abcdefgh 0123456789\n" * 6, "9+9=18\n8+8=", "h g f")
    ]
    budgets = [3, 40, 17, 9, 60, 26]
    replies = await asyncio.gather(
        *(
            client.generate(prompt, max_new_tokens=budget, temperature=1.0, ignore_eos=True)
            for prompt, budget in zip(prompts * 3, budgets * 3, strict=True)
        )
    )
    for prompt, budget, reply in zip(prompts * 3, budgets * 3, replies, strict=True):
        assert len(reply["output_ids"]) == budget
        expected = reference.logprobs(prompt, reply["output_ids"])
        assert _logprobs(reply) == pytest.approx(expected, abs=client.engine.tolerance)


async def test_stop_token_ends_the_output_and_stays_in_it(client, ids):
    prompt = ids("4+4=")
    free = await client.generate(prompt, max_new_tokens=20, **GREEDY)
    stop = free["output_ids"][6]
    first = free["output_ids"].index(stop)
    params = {"max_new_tokens": 20, "temperature": 0.0, "stop_token_ids": [stop]}
    reply = await client.generate(prompt, **params)
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert reply["output_ids"] == free["output_ids"][: first + 1]
    assert len(reply["meta_info"]["output_token_logprobs"]) == first + 1
    kept = await client.generate(prompt, **params, no_stop_trim=True, skip_special_tokens=False)
    assert kept["output_ids"] == reply["output_ids"]
    assert kept["text"].startswith(reply["text"])
    assert len(kept["text"]) > len(reply["text"])


async def test_stop_string_ends_the_output_and_is_trimmed_from_the_text(client, ids):
    prompt = ids("7+1=")
    free = await client.generate(prompt, max_new_tokens=30, skip_special_tokens=False, **GREEDY)
    stop = free["text"][5:7]
    assert len(stop) == 2
    reply = await client.generate(
        prompt, max_new_tokens=30, temperature=0.0, ignore_eos=True, stop=["never", stop]
    )
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert stop not in reply["text"]
    assert reply["output_ids"] == free["output_ids"][: len(reply["output_ids"])]
    assert len(reply["output_ids"]) < 30


async def test_min_new_tokens_holds_stop_tokens_back(client, ids):
    every_token = list(range(2, 20))
    reply = await client.generate(
        ids("5="), max_new_tokens=30, min_new_tokens=9, temperature=1.0, stop_token_ids=every_token
    )
    assert 9 <= len(reply["output_ids"]) <= 30
    assert not set(reply["output_ids"][:9]) & {1, *every_token}


async def test_a_seed_makes_the_draw_reproducible_whoever_else_runs(client, ids):
    if not client.engine.draws_by_seed:
        pytest.skip("SGLang draws by seed under --enable-deterministic-inference alone")
    params = {"max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True, "sampling_seed": 41}
    alone = await client.generate(ids("1+1="), **params)
    others = [client.generate(ids("ab" * n), max_new_tokens=30, ignore_eos=True) for n in range(1, 6)]
    *_, crowded = await asyncio.gather(*others, client.generate(ids("1+1="), **params))
    assert crowded["output_ids"] == alone["output_ids"]
    other = await client.generate(ids("1+1="), **{**params, "sampling_seed": 42})
    assert other["output_ids"] != alone["output_ids"]


async def test_n_samples_share_a_prompt_and_differ(client, reference, ids):
    if client.engine.draws_by_seed and not client.engine.ours:
        pytest.skip(
            "SGLang draws all samples of a request by one seed under --enable-deterministic-inference"
        )
    prompt = ids("12+7=")
    replies = await client.generate(prompt, n=4, max_new_tokens=20, temperature=1.0, ignore_eos=True)
    assert isinstance(replies, list)
    assert len(replies) == 4
    assert len({tuple(reply["output_ids"]) for reply in replies}) == 4
    assert len({reply["meta_info"]["id"] for reply in replies}) == 4
    for reply in replies:
        expected = reference.logprobs(prompt, reply["output_ids"])
        assert _logprobs(reply) == pytest.approx(expected, abs=client.engine.tolerance)


async def test_a_batch_is_answered_in_its_order(client, ids):
    prompts = [ids("1+1="), ids("abc"), ids("99")]
    singles = [await client.generate(prompt, max_new_tokens=6, **GREEDY) for prompt in prompts]
    batch = await client.post(
        "/generate",
        {
            "input_ids": prompts,
            "sampling_params": [{"max_new_tokens": 6, **GREEDY}] * 3,
            "rid": ["batch-a", "batch-b", "batch-c"],
        },
    )
    assert [reply["output_ids"] for reply in batch] == [reply["output_ids"] for reply in singles]
    assert [reply["meta_info"]["id"] for reply in batch] == ["batch-a", "batch-b", "batch-c"]


async def test_stream_is_cumulative_and_ends_as_the_plain_reply(client, ids):
    prompt = ids("6+6=")
    plain = await client.generate(prompt, max_new_tokens=12, **GREEDY)
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": 12, **GREEDY},
        "return_logprob": True,
    }
    events = [event async for event in client.events("/generate", body)]
    for earlier, later in pairwise(events):
        assert later["output_ids"][: len(earlier["output_ids"])] == earlier["output_ids"]
        assert earlier["meta_info"]["finish_reason"] is None
    assert events[-1]["output_ids"] == plain["output_ids"]
    assert events[-1]["text"] == plain["text"]
    assert events[-1]["meta_info"]["finish_reason"] == plain["meta_info"]["finish_reason"]
    assert _logprobs(events[-1]) == pytest.approx(_logprobs(plain), abs=client.engine.tolerance)


async def test_the_context_is_a_limit_that_errors_name(client, ids):
    limit = client.engine.context_length
    if not limit:
        pytest.skip("SGLang reports no context_length in /server_info of this release")
    reply = await client.http.post("/generate", json={"input_ids": [2] * (limit + 3)})
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert str(limit + 3) in message
    assert str(limit) in message


@pytest.mark.parametrize(
    "sampling, named",
    [
        ({"temprature": 1.0}, "temprature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"n": 0}, "n"),
        ({"stop": [1]}, "stop"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens"),
    ],
)
async def test_bad_sampling_params_are_refused_by_name(client, ids, sampling, named):
    if not client.engine.ours and named in ("n", "stop"):
        pytest.skip(f"SGLang does not check {named} before it schedules the request")
    if not client.engine.ours and named == "temprature":
        pytest.skip("SGLang answers unknown sampling parameters with 500")
    reply = await client.http.post("/generate", json={"input_ids": ids("1"), "sampling_params": sampling})
    assert reply.status_code == 400
    assert named in reply.text


@pytest.mark.parametrize(
    "body",
    [
        b"{not json",
        b"[]",
        b"{}",
        b'{"text": 5}',
        b'{"input_ids": []}',
        b'{"input_ids": [1.5]}',
        b'{"input_ids": [99999999]}',
        b'{"input_ids": [[2], 3]}',
        b'{"input_ids": [2], "text": "1"}',
        b'{"input_ids": [2], "sampling_params": []}',
        b'{"input_ids": [2], "rid": 7}',
        b'{"input_ids": [2], "stream": "yes"}',
        b"\xff\xfe",
    ],
)
async def test_rubbish_is_a_400_and_the_engine_goes_on(client, ids, body):
    if not client.engine.ours:
        pytest.skip("the statuses and words for malformed bodies are those of SGLang's own validators")
    reply = await client.http.post("/generate", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert (await client.http.get("/health")).status_code == 200
    assert len((await client.generate(ids("1"), max_new_tokens=2, **GREEDY))["output_ids"]) == 2


async def test_penalties_and_bias_change_what_is_drawn(client, ids):
    prompt = ids("1=")
    plain = await client.generate(prompt, max_new_tokens=20, **GREEDY)
    favourite = plain["output_ids"][0]
    biased = await client.generate(prompt, max_new_tokens=20, logit_bias={str(favourite): -100}, **GREEDY)
    assert favourite not in biased["output_ids"]
    spread = await client.generate(prompt, max_new_tokens=20, frequency_penalty=2.0, **GREEDY)
    assert len(set(spread["output_ids"])) > len(set(plain["output_ids"]))


async def test_health_generate_and_model_info(client):
    assert (await client.http.get("/health")).status_code == 200
    assert (await client.http.get("/health_generate")).status_code == 200
    info = await client.get("/model_info")
    assert info["is_generation"] is True
    assert info == await client.get("/get_model_info")
    assert isinstance(info["weight_version"], str)
