"""The gateway as a process, between a real ledger and a real engine."""

# ruff: noqa: ASYNC110  # polled with a deadline: other processes have no events here

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launched import free_port
from milepost.client.rollout import RolloutClient
from milepost.convert import open_group
from milepost.types import (
    DropReason,
    Outcome,
    Prompt,
    PromptState,
    RolloutOptions,
    RolloutStatus,
    SamplingParams,
    VersionSpan,
)
from milepost.v1 import reward_pb2, reward_pb2_grpc, sample_pb2
from milepost_common.server import GrpcServer

pytestmark = pytest.mark.timeout(300)
DEADLINE_S = 90.0


def sums(count: int, *, start: int = 0, **more: Any) -> list[Prompt]:
    return [
        Prompt(prompt_id=f"p{start + i}", text=f"{10 + i}+25=", label="053", **more) for i in range(count)
    ]


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not await condition():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"never happened: {what}") from None


def test_importing_the_service_brings_no_torch():
    code = (
        "import sys, milepost_rollout.service, milepost_rollout.rewards.worker, milepost_rollout.__main__; "
        "print([m for m in ('torch', 'transformers', 'redis') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


async def test_prompts_become_sealed_groups_through_the_router(
    driver: Any, engine: Any, start_router: Any, start_gateway: Any
):
    _, router, http = start_router(buffer=driver.buffer.address, engines=engine.url)
    _, address = start_gateway(
        buffer=driver.buffer.address, run_id=driver.run_id, router=router, router_http=f"http://{http}"
    )
    async with RolloutClient(address) as gateway:

        async def waits() -> bool:
            return "does not exist yet" in (await gateway.get_status()).waiting_for

        await eventually(waits, "the gateway says that it waits for the run")
        await driver.create()
        version = await driver.publish(0, engine)
        await driver.feed(*sums(4))
        groups = await driver.step(1)
        assert {g.prompt_id for g in groups} == {"p0", "p1", "p2", "p3"}
        for payload in await driver.payloads([g.prompt_id for g in groups]):
            check_group(payload, version=version, engine_id=engine.url.removeprefix("http://"))
        await driver.feed(Prompt(prompt_id="long", text="1" * 64), *sums(1, start=4))
        rows = await driver.until_states(long=PromptState.DROPPED, p4=PromptState.READY)
        assert rows["long"].drop_reason is DropReason.INVALID
        assert "64 tokens" in rows["long"].detail
        assert "context of 64 tokens" in rows["long"].detail
        status = await gateway.get_status()
        assert status.groups_sealed == 5
        assert sum(status.outcomes.values()) == 10
        assert status.tokens_generated > 0
        assert not status.paused


def check_group(payload: bytes, *, version: int, engine_id: str) -> None:
    opened = open_group(payload)
    assert opened.prompt.label == "053"
    assert [s.index for s in opened.samples] == [0, 1]
    for s in opened.samples:
        assert len(s.tokens) == len(s.loss_mask) == len(s.logprobs)
        assert s.prompt_length == 6
        assert s.loss_mask.tolist() == [0] * 6 + [1] * (len(s.tokens) - 6)
        assert (s.logprobs[6:] < 0).all()
        assert not s.logprobs[:6].any()
        assert s.version_spans == (VersionSpan(start=6, end=len(s.tokens), weight_version=version),)
        assert s.version_spans_exact
        assert s.engine_id == engine_id
        assert s.outcome in (Outcome.COMPLETED, Outcome.TRUNCATED)
        assert s.reward == float(s.text.strip() == "053")


async def test_the_gateway_waits_while_the_router_is_away(
    driver: Any, engine: Any, start_router: Any, start_gateway: Any
):
    await driver.create()
    await driver.publish(0, engine)
    common = {"buffer": driver.buffer.address, "engines": engine.url}
    where = {x: f"127.0.0.1:{free_port()}" for x in ("listen", "http_listen")}
    process, router, http = start_router(**common, **where)
    process.kill()
    _, address = start_gateway(
        buffer=driver.buffer.address, run_id=driver.run_id, router=router, router_http=f"http://{http}"
    )
    await driver.feed(*sums(4))
    async with RolloutClient(address) as gateway:

        async def waits() -> bool:
            status: RolloutStatus = await gateway.get_status()
            return status.groups_in_flight == 4 and "engines" in status.waiting_for

        await eventually(waits, "the gateway says that it waits for engines")
        start_router(**common, **where)
        rows = await driver.until(lambda rows: all(r.state is PromptState.READY for r in rows.values()))
    assert {r.attempt for r in rows.values()} == {1}
    assert {r.failed_attempts for r in rows.values()} == {0}


async def test_a_killed_gateway_loses_nothing_and_its_successor_takes_over_at_once(
    driver: Any, engine: Any, start_gateway: Any
):
    await driver.create(lease_ttl_s=60.0)
    await driver.publish(0, engine)
    common = {"buffer": driver.buffer.address, "run_id": driver.run_id, "gateway_id": "g"}
    first, _ = start_gateway(**common, router_http="http://127.0.0.1:9")
    await driver.feed(*sums(8))
    await driver.until(lambda rows: all(r.state is PromptState.ROLLING for r in rows.values()))
    first.kill()
    start_gateway(**common, router_http=engine.url)
    rows = await driver.until(lambda rows: all(r.state is PromptState.READY for r in rows.values()))
    assert len(rows) == 8
    assert {r.attempt for r in rows.values()} == {2}
    audit = await driver.buffer.audit_ledger(driver.run_id)
    assert audit.closes, audit.problems


async def test_sigterm_gives_the_rest_back_and_ends_with_0(driver: Any, engine: Any, start_gateway: Any):
    await driver.create()
    await driver.publish(0, engine)
    process, _ = start_gateway(
        buffer=driver.buffer.address, run_id=driver.run_id, router_http="http://127.0.0.1:9", drain_s=0.3
    )
    await driver.feed(*sums(4))
    await driver.until(lambda rows: all(r.state is PromptState.ROLLING for r in rows.values()))
    assert await asyncio.to_thread(process.stop) == 0
    rows = await driver.rows()
    assert {r.state for r in rows.values()} == {PromptState.WAITING}
    assert {r.failed_attempts for r in rows.values()} == {0}


async def test_a_reward_that_cannot_be_imported_ends_the_gateway_and_loses_nothing(
    driver: Any, engine: Any, start_gateway: Any, tmp_path: Path
):
    await driver.create(reward="my_rewards:score")
    await driver.publish(0, engine)
    await driver.feed(*sums(2))
    common = {"buffer": driver.buffer.address, "run_id": driver.run_id, "router_http": engine.url}
    process, _ = start_gateway(**common, ready=False)
    assert await asyncio.to_thread(process.wait) == 2
    said = process.log.read_text()
    assert "reward 'my_rewards:score': there is no module 'my_rewards'" in said
    assert "rollout.reward_path" in said
    assert {r.state for r in (await driver.rows()).values()} == {PromptState.WAITING}
    (tmp_path / "my_rewards.py").write_text("def score(sample):\n    return len(sample.response)\n")
    start_gateway(**common)
    await driver.until(lambda rows: all(r.state is PromptState.READY for r in rows.values()))


REWARDS = """
import time

def picky(sample):
    if sample.label == "raise":
        raise ValueError("cannot read this")
    while sample.label == "hang":
        time.sleep(0.01)
    return 1.0 if sample.label == "equal" else sample.index
"""


async def test_rewards_that_fail_follow_the_policy(
    driver: Any, engine: Any, start_gateway: Any, tmp_path: Path
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "my_rewards.py").write_text(REWARDS)
    await driver.create(reward="my_rewards:picky", max_attempts=2, filter_equal_rewards=True)
    await driver.publish(0, engine)
    labels = ("good", "raise", "hang", "equal")
    await driver.feed(*(Prompt(prompt_id=x, text="10+25=", label=x) for x in labels))
    start_gateway(
        buffer=driver.buffer.address,
        run_id=driver.run_id,
        router_http=engine.url,
        reward_path='["folder"]',
        reward_timeout_s=3,
    )
    dropped = PromptState.DROPPED
    rows = await driver.until_states(
        good=PromptState.READY, **{"raise": dropped}, hang=dropped, equal=dropped
    )
    assert rows["raise"].drop_reason is DropReason.REWARD_ERROR
    assert rows["raise"].failed_attempts == 2
    assert (
        "reward 'my_rewards:picky', prompt 'raise': raised ValueError: cannot read this"
        in rows["raise"].detail
    )
    assert rows["hang"].drop_reason is DropReason.REWARD_ERROR
    assert "no answer within 3 s" in rows["hang"].detail
    assert rows["equal"].drop_reason is DropReason.FILTER
    assert "every reward is 1" in rows["equal"].detail
    assert (await driver.buffer.audit_ledger(driver.run_id)).closes


async def test_evaluation_beside_rollout(driver: Any, engine: Any, start_gateway: Any, tmp_path: Path):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"prompt": f"{i}+1=", "label": "x"}) + "\n" for i in range(10, 26)))
    await driver.create(reward="regex:^")
    first = await driver.publish(0, engine)
    _, address = start_gateway(
        "--evaluate.prompts",
        str(held),
        "--evaluate.every_steps",
        "2",
        buffer=driver.buffer.address,
        run_id=driver.run_id,
        router_http=engine.url,
    )
    results = tmp_path / "runs" / driver.run_id / "eval.jsonl"

    async def evaluated(label: int) -> bool:
        lines = results.read_text().splitlines(keepends=True) if results.exists() else []
        return any(f'"weight_label": {label}' in line and line.endswith("\n") for line in lines)

    await eventually(lambda: evaluated(0), "the first version is evaluated")
    line = json.loads(results.read_text().splitlines()[0])
    assert (line["weight_version"], line["num_scored"], line["reward_mean"]) == (first, 16, 1.0)
    await driver.feed(*sums(4))
    await driver.step(1)
    await driver.publish(1, engine)
    second = await driver.publish(2, engine)
    await eventually(lambda: evaluated(2), "the third version is evaluated")
    async with RolloutClient(address) as gateway:
        now = await gateway.evaluate(prompts=[Prompt(prompt_id="h", text="1+1=")], samples_per_prompt=3)
        assert (now.weight_version, now.weight_label) == (second, 2)
        assert (now.num_scored, now.num_requested, now.reward_mean) == (3, 3, 1.0)
        gone = await gateway.evaluate(prompts=[Prompt(prompt_id="h", text="1+1=")], weight_version=first)
        assert gone.failures == {"aborted": 1}
        status = await gateway.get_status()
        assert gone.reward_mean != gone.reward_mean, "no mean of nothing"
        assert status.last_evaluation is not None
        assert status.last_evaluation.failures == gone.failures


async def stream(*prompts: Prompt) -> AsyncIterator[Prompt]:
    for prompt in prompts:
        yield prompt


async def test_standalone_streams_need_no_ledger(engine: Any, start_router: Any, start_gateway: Any):
    await asyncio.to_thread(engine.carry, "default")
    _, router, http = start_router(buffer="", engines=engine.url)
    process, address = start_gateway(buffer="", router=router, router_http=f"http://{http}")
    ids = np.array([1, 2, 10, 3, 4, 11], np.int32)
    prompts = [
        *sums(20),
        Prompt(prompt_id="ids", input_ids=ids, label="x", reward="regex:^"),
        Prompt(prompt_id="chat", text="x", reward="exct"),
        Prompt(prompt_id="long", text="1" * 70),
    ]
    options = RolloutOptions(
        samples_per_prompt=3, reward="exact", sampling=SamplingParams(max_new_tokens=4, temperature=0.0)
    )
    async with RolloutClient(address) as gateway:
        got = {t.prompt_id: t async for t in gateway.rollout(stream(*prompts), options=options, timeout_s=60)}
        assert set(got) == {p.prompt_id for p in prompts}
        assert "did you mean 'exact'" in got["chat"].error
        assert "70 tokens" in got["long"].error
        for prompt in prompts[:20]:
            texts = {s.text for s in got[prompt.prompt_id].samples}
            assert len(texts) == 1, "greedy samples agree"
            assert len(got[prompt.prompt_id].samples) == 3
        assert got["ids"].samples[0].tokens[:6].tolist() == ids.tolist()
        assert [s.reward for s in got["ids"].samples] == [1.0] * 3
        assert {span.weight_version for s in got["ids"].samples for span in s.version_spans} == {0}
    assert await asyncio.to_thread(process.stop) == 0


async def test_aborted_requests_go_on_with_the_tokens_they_have(driver: Any, engine: Any, start_gateway: Any):
    sampling = SamplingParams(max_new_tokens=50, ignore_eos=True)
    await driver.create(sampling=sampling, groups_per_step=8, reward="regex:^")
    version = await driver.publish(0, engine)
    start_gateway(buffer=driver.buffer.address, run_id=driver.run_id, router_http=engine.url)
    await driver.feed(*sums(16))
    for _ in range(30):
        await asyncio.to_thread(engine.call, "/abort_request", abort_all=True)
    rows = await driver.until(lambda rows: all(r.state is PromptState.READY for r in rows.values()))
    assert {r.failed_attempts for r in rows.values()} == {0}
    groups = await driver.step(1)
    for payload in await driver.payloads([g.prompt_id for g in groups]):
        for s in open_group(payload).samples:
            assert (len(s.tokens), int(s.loss_mask.sum())) == (56, 50)
            assert s.version_spans == (VersionSpan(start=6, end=56, weight_version=version),)
            assert s.outcome is Outcome.TRUNCATED


class Judge(reward_pb2_grpc.RewardServiceServicer):
    """Scores a sample by the length of its text."""

    async def Score(self, request: Any, context: Any) -> Any:
        return reward_pb2.ScoreResponse(rewards=[len(s.text) for s in request.samples])


class Echo(reward_pb2_grpc.EnvironmentServiceServicer):
    """Says how often the model spoke, and ends after its second turn."""

    def __init__(self) -> None:
        self.turns: dict[str, int] = {}

    async def Reset(self, request: Any, context: Any) -> Any:
        self.turns[request.episode_id] = 0
        return reward_pb2.ResetResponse(messages=[sample_pb2.ChatMessage(role="user", content="1+")])

    async def Step(self, request: Any, context: Any) -> Any:
        self.turns[request.episode_id] += 1
        turn = self.turns[request.episode_id]
        return reward_pb2.StepResponse(
            messages=[sample_pb2.ChatMessage(role="user", content="2=")], done=turn == 2, reward=turn
        )


async def test_rewards_and_environments_of_users_over_grpc(engine: Any, start_gateway: Any):
    await asyncio.to_thread(engine.carry, "default")
    echo = Echo()
    async with GrpcServer(listen="127.0.0.1:0") as server:
        server.add(reward_pb2_grpc.add_RewardServiceServicer_to_server, Judge(), "milepost.v1.RewardService")
        server.add(
            reward_pb2_grpc.add_EnvironmentServiceServicer_to_server, echo, "milepost.v1.EnvironmentService"
        )
        await server.start()
        remote = f"grpc://{server.address}"
        options = RolloutOptions(
            samples_per_prompt=2, reward=remote, sampling=SamplingParams(max_new_tokens=3, stop=("\n",))
        )
        _, plain = start_gateway(buffer="", router_http=engine.url)
        async with RolloutClient(plain) as gateway:
            (only,) = [t async for t in gateway.rollout(stream(*sums(1)), options=options, timeout_s=60)]
            assert [s.reward for s in only.samples] == [len(s.text) for s in only.samples]
        _, playing = start_gateway(buffer="", router_http=engine.url, environment=remote)
        async with RolloutClient(playing) as gateway:
            prompt = Prompt(prompt_id="p", text="9+9=18 ")
            (only,) = [t async for t in gateway.rollout(stream(prompt), options=options, timeout_s=60)]
    assert sorted(echo.turns.values())[-1] <= 2
    for s in only.samples:
        assert s.error == ""
        generated = int(s.loss_mask[s.prompt_length :].sum())
        assert s.prompt_length == len("9+9=18 1+")
        if s.outcome is Outcome.COMPLETED:
            assert s.reward == 3.0
            assert len(s.tokens) - s.prompt_length == generated + len("2=")
        else:
            assert s.outcome is Outcome.TRUNCATED
            assert s.reward == 1.0
