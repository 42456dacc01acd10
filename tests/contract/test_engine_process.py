"""The CPU engine as a process: readiness, signals, keys, missing tokenizers, models that cannot be served."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import httpx
import pytest

from launched import free_port
from moments import Missed, caught

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        bool(os.environ.get("MILEPOST_ENGINE_URL")),
        reason="SGLang's processes are not ours to start and stop",
    ),
]


async def _until_running(http):
    async def running():
        state = (await http.get("/server_info")).json()["internal_states"][0]
        return state["num_running_reqs"] > 0

    async with asyncio.timeout(60):
        while not await running():  # noqa: ASYNC110 (the condition lives in another process)
            await asyncio.sleep(0.005)


DYING = """
import sys
from milepost_engine import runner
from milepost_engine.__main__ import main

decode, calls = runner.ModelRunner.decode, []

def dying(self, tokens):
    calls.append(1)
    if len(calls) > 50:
        raise RuntimeError("this forward pass fails")
    return decode(self, tokens)

runner.ModelRunner.decode = dying
sys.exit(main(sys.argv[1:]))
"""


async def test_a_dead_scheduler_ends_its_requests_and_the_process(model_dir, ids):
    command = [sys.executable, "-c", DYING, "--model", str(model_dir), "--port", "0"]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(100):
            line = (await process.stdout.readline()).decode()
            url = line.split()[2]
            body = {"input_ids": ids("1="), "sampling_params": {"max_new_tokens": 900, "ignore_eos": True}}
            async with httpx.AsyncClient(base_url=url, timeout=60) as http:
                reply = await http.post("/generate", json=body)
            _, log = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert reply.status_code == 200
    assert reply.json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert 1 <= reply.json()["meta_info"]["completion_tokens"] < 900
    assert process.returncode == 1
    assert "this forward pass fails" in log.decode()


async def test_admin_routes_want_their_key_and_a_group_that_does_not_form_is_given_up(launch, ids):
    process = launch("--admin-api-key", "s3cret", "--max-running-requests", "2", "--group-timeout-s", "1")
    async with httpx.AsyncClient(base_url=process.url, timeout=60) as http:
        for path in ("/pause_generation", "/abort_request", "/begin_weight_update", "/flush_cache"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
                refused = await http.post(path, json={"abort_all": True}, headers=headers)
                assert refused.status_code == 401, path
        key = {"authorization": "Bearer s3cret"}
        assert (await http.post("/begin_weight_update", json={}, headers=key)).status_code == 200
        assert (await http.get("/health")).status_code == 200
        assert "s3cret" not in (await http.get("/server_info")).text
        body = {"input_ids": ids("1="), "sampling_params": {"max_new_tokens": 5, "ignore_eos": True}}
        replies = await asyncio.gather(*(http.post("/generate", json=body) for _ in range(7)))
        assert [reply.status_code for reply in replies] == [200] * 7  # more than rows: they queue
        await _expect_no_group(http, key)


async def _expect_no_group(http, key):
    """Nobody listens where the group should meet: the engine waits for a second, serving meanwhile."""
    body = {
        "master_address": "127.0.0.1",
        "master_port": int(free_port()),
        "rank_offset": 1,
        "world_size": 2,
        "group_name": "alone",
        "backend": "gloo",
    }

    async def serves_while_it_waits():
        joining = asyncio.create_task(http.post("/init_weights_update_group", json=body, headers=key))
        assert (await http.get("/health_generate")).status_code == 200
        meanwhile = not joining.done()
        reply = await joining
        assert reply.status_code == 400
        assert "did not form" in reply.json()["message"]
        if not meanwhile:
            raise Missed

    await caught("an answer while a group is waited for", serves_while_it_waits)


async def test_without_a_tokenizer_and_until_sigterm(launch, model_dir, tmp_path, ids):
    """A folder with a config alone, tokens in and out; then a signal in the middle of a request."""
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    process = launch("--skip-tokenizer-init", "--seed", "7", "--shutdown-timeout-s", "10", model=tmp_path)
    async with httpx.AsyncClient(base_url=process.url, timeout=60) as http:
        body = {"input_ids": ids("1="), "sampling_params": {"max_new_tokens": 5, "ignore_eos": True}}
        reply = (await http.post("/generate", json=body)).json()
        assert "text" not in reply
        assert len(reply["output_ids"]) == 5
        for bad in ({"text": "1="}, {**body, "sampling_params": {"stop": "x"}}):
            refused = await http.post("/generate", json=bad)
            assert refused.status_code == 400
            assert "tokenizer" in refused.text
        long = {"input_ids": ids("1="), "sampling_params": {"max_new_tokens": 30_000, "ignore_eos": True}}
        running = asyncio.create_task(http.post("/generate", json=long))
        await _until_running(http)
        status = await asyncio.to_thread(process.stop)  # fails after 40 s
        last = await running
    assert status == 0
    assert last.status_code == 200
    meta = last.json()["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    assert 1 <= meta["completion_tokens"] < 30_000


def test_a_model_that_cannot_be_served_ends_the_process_with_two():
    command = [sys.executable, "-m", "milepost_engine", "--model", "/nowhere/at-all", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2, done.stderr
    assert "/nowhere/at-all" in done.stderr
