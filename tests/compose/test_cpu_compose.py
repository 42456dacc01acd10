"""deploy/compose/cpu.yaml for real: the demo's loop in containers, trainer and gateway killed in mid-run.

Runs under `make compose-test` alone. The judge is the ledger's audit, against the checkpoints, the trainer's
step log and the ids that the feeder was told."""

from __future__ import annotations

import os
import time

import pytest

from compose_project import PROMPTS, STEPS, Compose, audit, docker, order_of, until_committed

pytestmark = [
    pytest.mark.compose,
    pytest.mark.skipif(
        os.environ.get("MILEPOST_COMPOSE") != "1", reason="needs Docker: run `make compose-test`"
    ),
    pytest.mark.timeout(2400),
]

FIND_TORCH = "import importlib.util, os; print(os.getuid(), importlib.util.find_spec('torch') is not None)"


async def test_a_run_survives_its_trainer_and_its_gateway(project: Compose) -> None:
    started = time.monotonic()
    await project.up()
    async with project.buffer() as buffer:
        await until_committed(buffer, 1, within_s=180)
        print(f"first trained step {time.monotonic() - started:.0f} s after up")

        await until_committed(buffer, 3, within_s=120)
        await project.kill("trainer")
        before = await order_of(buffer)
        last = max(step for step, _ in before)
        assert last < STEPS
        await project.up("trainer")
        await until_committed(buffer, last + 1, within_s=180)
        after = await order_of(buffer)
        assert {at: after[at] for at in before} == before

        await project.kill("rollout")
        assert (await until_committed(buffer, last, within_s=10)).committed_step < STEPS
        await project.up("rollout")
        await until_committed(buffer, STEPS, within_s=300)
    assert await project.exited("trainer", within_s=90) == 0
    assert await project.exited("feeder", within_s=30) == 0

    report = await audit(project, "/runs/demo")
    assert not report["problems"]
    assert (report["lost"], report["twice"], report["in_flight"]) == (0, 0, 0)
    assert report["accepted"] == PROMPTS == report["trained"] + sum(report["dropped"].values())

    for service in ("rollout", "engine-1", "router", "buffer"):
        assert (await project.state(service))["Health"] == "healthy", service
        await project.call("stop", service)
        assert (await project.state(service))["ExitCode"] == 0, f"{service} did not stop in order"


@pytest.mark.parametrize(
    ("image", "torch"),
    [("buffer", False), ("router", False), ("rollout", False), ("engine", True), ("trainer", True)],
)
async def test_images_run_as_nobody_in_particular_and_only_two_bring_torch(
    images: None, image: str, torch: bool
) -> None:
    name = f"milepost/{image}:latest"
    _, said = await docker(
        "run", "--rm", "--network", "none", "--entrypoint", "python", name, "-c", FIND_TORCH
    )
    assert said.split() == ["1000", str(torch)]
