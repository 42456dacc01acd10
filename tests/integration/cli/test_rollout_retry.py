"""`milepost rollout` over a gateway that goes away in the middle: every prompt once, none twice."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from milepost.errors import Unavailable
from milepost.v1 import rollout_pb2 as pb
from milepost.v1 import sample_pb2
from milepost.v1.rollout_pb2_grpc import RolloutServiceServicer, add_RolloutServiceServicer_to_server
from milepost_common.server import GrpcServer

from .conftest import Start


class Fickle(RolloutServiceServicer):
    """Answers `patience[n]` prompts of the n-th stream, the first of them twice, and then breaks it off."""

    def __init__(self, *patience: int) -> None:
        self.patience = list(patience)
        self.asked: list[list[str]] = []
        self.options: list[Any] = []

    async def Rollout(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.RolloutResponse]:
        left = self.patience.pop(0) if self.patience else 1000
        asked: list[str] = []
        self.asked.append(asked)
        async for request in request_iterator:
            if request.HasField("options"):
                self.options.append(request.options)
            for prompt in request.prompts:
                asked.append(prompt.prompt_id)
                if not left:
                    raise Unavailable("the gateway is leaving")
                left -= 1
                sample = sample_pb2.Sample(outcome=sample_pb2.OUTCOME_COMPLETED, reward=0.5, text="t")
                for _ in range(2 if len(asked) == 1 else 1):
                    yield pb.RolloutResponse(prompt_id=prompt.prompt_id, samples=[sample])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(6)))
    return path


async def test_unanswered_prompts_are_asked_for_again(milepost: Start, prompts: Path, tmp_path: Path) -> None:
    fickle, out = Fickle(2, 0, 1), tmp_path / "out.jsonl"
    async with GrpcServer(listen="127.0.0.1:0") as server:
        server.add(add_RolloutServiceServicer_to_server, fickle, "milepost.v1.RolloutService")
        await server.start()
        flags = ("--temperature", "0.5", "--samples", "3", "--reward", "exact", "--stop", ";", "--top-k", "7")
        run = await milepost("rollout", prompts, "--rollout", server.address, "--out", out, *flags)
        err = (await run.communicate())[1].decode()
    assert run.returncode == 0, err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(r["prompt_id"] for r in rows) == [f"p/0/{i}" for i in range(6)]
    assert "asking again" in err
    assert "6 samples (6 completed), 0 prompts refused, mean reward 0.5000" in err
    options = fickle.options[0]
    assert (options.samples_per_prompt, options.reward) == (3, "exact")
    assert (options.sampling.temperature, list(options.sampling.stop), options.sampling.top_k) == (
        0.5,
        [";"],
        7,
    )
    assert not options.sampling.HasField("top_p")


async def test_a_gateway_that_stays_away_is_given_up_in_time(milepost: Start, prompts: Path) -> None:
    run = await milepost("rollout", prompts, "--rollout", "127.0.0.1:1", "--retry-s", "0.5")
    out, err = await run.communicate()
    assert run.returncode == 1
    assert out == b""
    assert b"127.0.0.1:1 does not answer" in err


async def test_no_gateway_and_no_engine_is_a_wrong_command_line(milepost: Start, prompts: Path) -> None:
    run = await milepost("rollout", prompts, "--rollout", "127.0.0.1:1", "--standalone")
    _, err = await run.communicate()
    assert run.returncode == 2
    assert b"--standalone needs --engine URL" in err
