"""deploy/compose/cpu.yaml for real: the demo's loop in containers, each killed once in mid-run.

Runs under `make compose-test` alone. The judge is the ledger's audit, against the checkpoints, the trainer's
step log and the ids that the feeder was told."""

from __future__ import annotations

import time

import pytest

from compose_project import (
    MARKS,
    PATIENCE_S,
    Compose,
    assert_audit_closes,
    docker,
    order_of,
    until_committed,
    until_goes_on,
)
from milepost import BufferClient
from stack import until

pytestmark = MARKS

# The engine is first: it comes back, and is given weights, while others die.
KILLED = ("engine-1", "trainer", "rollout", "router", "buffer", "redis", "feeder")
FIND_TORCH = "import importlib.util, os; print(os.getuid(), importlib.util.find_spec('torch') is not None)"


async def test_any_one_container_is_killed_and_up_again_goes_on(project: Compose) -> None:
    started = time.monotonic()
    await project.up()
    async with project.buffer() as buffer:
        await until_committed(buffer, 1)
        print(f"first trained step {time.monotonic() - started:.0f} s after up")
        for service in KILLED:
            await kill_and_go_on(project, buffer, service)
        await until_serving(project, "engine-1")
        await until_committed(buffer, project.steps)

    assert await project.exited("trainer") == 0
    assert await project.exited("feeder") == 0
    await assert_audit_closes(project)


async def kill_and_go_on(project: Compose, buffer: BufferClient, service: str) -> None:
    """Kills one container; `up` brings it back, two more steps are trained, what had been taken stays."""
    before = await order_of(buffer)
    await project.kill(service)
    await project.up()
    stats = await until_goes_on(buffer)
    assert stats.committed_step < project.steps, f"{service} died too late: the run was over"
    after = await order_of(buffer)
    assert {at: after[at] for at in before} == before, f"{service} died, and steps hold other groups"
    print(f"{service} killed and back: step {stats.committed_step} is committed")


async def until_serving(project: Compose, engine: str) -> None:
    """Waits until an engine has been given weights."""

    async def check() -> bool:
        return (await project.fleet())[engine]["state"] == "serving"

    await until(f"{engine} serves again", check, within_s=PATIENCE_S)


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
