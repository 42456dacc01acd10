"""A client in another language, made from the protos alone: examples/node-client, run as its README says.

What it prints is compared with what Milepost's own client reads from the same services.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from milepost import RouterClient
from milepost.client.rollout import RolloutClient
from milepost.types import EngineState, Outcome, Prompt, PromptState, RolloutOptions, SamplingParams
from stack import READY_S, ROOT, Stack, until

NODE, NPM = shutil.which("node"), shutil.which("npm")
EXAMPLE = ROOT / "examples" / "node-client"
INSTALL_S, RUN_S = 180.0, 120.0
PROMPTS, STEP, LIMIT = 24, 4, 16
"""Prompts fed, groups a step, and the prompts that may wait: (max_staleness + 2) * groups_per_step."""

pytestmark = [
    pytest.mark.skipif(not (NODE and NPM), reason="node and npm are not here"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("node") / "node-client"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules"))
    command = [str(NPM), "install", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@asynccontextmanager
async def node(client: Path, script: str, *args: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs a script of the example; it is killed when the context is left before its end."""
    environ = {**os.environ, "MILEPOST_PROTOS": str(ROOT / "protos")}
    process = await asyncio.create_subprocess_exec(
        str(NODE), script, *map(str, args), cwd=client, env=environ, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, limit=16 * 1024 * 1024,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def rows_of(process: asyncio.subprocess.Process, *, status: int = 0) -> list[dict[str, Any]]:
    """What it prints until its end."""
    async with asyncio.timeout(RUN_S):
        out, errors = await process.communicate()
    assert process.returncode == status, (out[-2000:], errors[-2000:])
    return [json.loads(line) for line in out.splitlines()]


async def said(process: asyncio.subprocess.Process, event: str) -> list[dict[str, Any]]:
    """The events that it prints up to one of this name."""
    assert process.stdout is not None
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(RUN_S):
        async for line in process.stdout:
            events.append(json.loads(line))
            if events[-1]["event"] == event:
                return events
    raise AssertionError(f"it ended without {event}: {events}")


def write_prompts(path: Path, *, label: str = "") -> Path:
    lines = [
        {"prompt_id": f"node-{i}", "prompt": f"{i + 10}+{i + 11}=", "label": label} for i in range(PROMPTS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


async def test_prompts_are_fed_with_credits_once_and_read_back(
    client: Path, stack: Stack, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    await stack.ready("trainer")
    await stack.ready("rollout")
    async with stack.buffer() as buffer, RolloutClient(stack.address("rollout")) as gateway:
        to_run = ("--buffer", buffer.address, "--run", stack.run_id)
        await gateway.pause()  # nothing is rolled out, so that credits run out

        async def leases_no_more() -> bool:
            return "resume: " in (await gateway.get_status()).waiting_for

        await until("no call for prompts is under way", leases_no_more, within_s=READY_S)
        async with node(client, "feed.js", prompts, *to_run, "--keep-open", "--patience", 300) as feeder:
            before = await said(feeder, "refused")
            assert [e["event"] for e in before] == ["opened", "accepted", "refused"]
            assert (before[1]["accepted"], before[1]["credits"]) == (LIMIT, 0)
            assert before[1]["cursor"] == str(LIMIT)
            refused = before[2]
            assert (refused["status"], refused["reason"]) == ("RESOURCE_EXHAUSTED", "NO_CREDITS")
            assert refused["domain"] == "milepost.dev"
            assert refused["metadata"] == {"credits": "0", "cursor": str(LIMIT)}
            assert refused["retry_after_s"] == 1.0
            assert (await stack.stats(buffer)).accepted == LIMIT
            await stack.kill("buffer")
            await gateway.resume()
            last = (await rows_of(feeder))[-1]
        assert last == {"event": "fed", "accepted": PROMPTS, "duplicates": 0}

        async with node(client, "feed.js", prompts, *to_run, "--source", "again", "--batch", 7) as feeder:
            events = await rows_of(feeder)
        assert events[-1] == {"event": "fed", "accepted": PROMPTS, "duplicates": PROMPTS}
        other = write_prompts(tmp_path / "other.jsonl", label="changed")
        async with node(client, "feed.js", other, *to_run) as feeder:
            failed = (await rows_of(feeder, status=1))[-1]
        assert (failed["status"], failed["reason"]) == ("ALREADY_EXISTS", "PROMPT_EXISTS")
        assert failed["metadata"]["prompt_id"] == "node-0"
        async with node(client, "feed.js", prompts, *to_run) as feeder:
            events = await rows_of(feeder)
        assert [e["event"] for e in events] == ["opened", "fed"]
        assert events[0]["cursor"] == str(PROMPTS)

        async def trained() -> bool:
            return (await stack.stats(buffer)).trained == PROMPTS

        await until("every prompt is trained on", trained, within_s=READY_S)
        await ledger_is_the_same(client, stack, to_run)
        audit = await buffer.audit_ledger(stack.run_id)
    assert (audit.accepted, audit.trained, audit.problems) == (PROMPTS, PROMPTS, ())


async def ledger_is_the_same(client: Path, stack: Stack, to_run: tuple[str, ...]) -> None:
    """What ledger.js prints is what Milepost's own client reads."""
    async with node(client, "ledger.js", *to_run, "--state", "trained") as reader:
        *rows, counts = await rows_of(reader)
    async with stack.buffer() as buffer:
        own = [row async for row in buffer.get_ledger(stack.run_id, states=[PromptState.TRAINED])]
    assert [(r["prompt_id"], r["step"], r["position"], r["staleness"]) for r in rows] == [
        (r.prompt_id, r.step, r.position, r.staleness) for r in own
    ]
    assert sorted(r["prompt_id"] for r in rows) == sorted(f"node-{i}" for i in range(PROMPTS))
    assert {r["state"] for r in rows} == {"trained"}
    stats = counts["stats"]
    assert (stats["trained"], stats["committed_step"]) == (PROMPTS, PROMPTS // STEP)


async def weights_stand(stack: Stack) -> None:
    """Waits until every engine serves the weights of the last step; there will be no other."""
    await stack.ready("trainer")
    await stack.ready("rollout")
    async with stack.buffer() as buffer, RouterClient(stack.address("router")) as router:

        async def stand() -> bool:
            stats = await stack.stats(buffer)
            states = [e.state for e in (await router.list_engines(stack.run_id)).engines]
            newest = stats.weight_version and stats.weight_label == stats.committed_step
            return bool(newest) and states == 2 * [EngineState.SERVING]

        await until("every engine serves the last step's weights", stand, within_s=READY_S)


async def test_trajectories_are_decoded(client: Path, stack: Stack, tmp_path: Path) -> None:
    prompts = [Prompt(prompt_id=f"roll-{i}", text=f"{i + 10}+{i + 21}=") for i in range(6)]
    lines = [{"prompt_id": p.prompt_id, "prompt": p.text} for p in prompts]
    (tmp_path / "roll.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    await weights_stand(stack)
    how = ("--samples", 2, "--reward", "mine:length", "--temperature", 0, "--max-new-tokens", 6)
    async with node(client, "rollout.js", tmp_path / "roll.jsonl", "--rollout", stack.address("rollout"),
                    *how) as roller:  # fmt: skip
        rows = await rows_of(roller)

    async def each() -> AsyncIterator[Prompt]:
        for prompt in prompts:
            yield prompt

    options = RolloutOptions(
        samples_per_prompt=2,
        reward="mine:length",
        sampling=SamplingParams(temperature=0.0, max_new_tokens=6),
    )
    async with RolloutClient(stack.address("rollout")) as gateway:
        own = {g.prompt_id: g.samples async for g in gateway.rollout(each(), options=options)}
    assert len(rows) == 2 * len(prompts)
    assert set(own) == {r["prompt_id"] for r in rows}
    for row in rows:
        sample = own[row["prompt_id"]][row["index"]]
        num_tokens, start = len(row["tokens"]), row["prompt_length"]
        assert len(row["logprobs"]) == len(row["loss_mask"]) == num_tokens
        assert row["loss_mask"] == [0] * start + [1] * (num_tokens - start)
        assert row["tokens"] == sample.tokens.tolist()
        assert row["logprobs"] == pytest.approx(sample.logprobs.tolist(), abs=1e-5)
        assert all(math.isfinite(x) and x <= 0 for x in row["logprobs"])
        assert any(x < 0 for x in row["logprobs"][start:])
        assert row["outcome"] in ("OUTCOME_COMPLETED", "OUTCOME_TRUNCATED")
        assert row["outcome"] == f"OUTCOME_{Outcome(sample.outcome).name}"
        assert row["reward"] == pytest.approx(0.25 + len(row["text"]) / 10)
        assert row["text"] == sample.text
        assert row["version_spans"][0][0] == start
        assert row["version_spans"][-1][1] == num_tokens
        assert all(version >= 1 for _, _, version in row["version_spans"])


async def test_a_refusal_names_service_status_and_reason(client: Path, stack: Stack) -> None:
    await stack.ready("buffer")
    async with node(client, "ledger.js", "--buffer", stack.address("buffer"), "--run", "nosuch") as reader:
        out, errors = await asyncio.wait_for(reader.communicate(), RUN_S)
    assert (reader.returncode, out) == (1, b"")
    assert f"{stack.address('buffer')}: NOT_FOUND" in errors.decode()
    assert "run_id = nosuch: no such run" in errors.decode()
