"""rollout.yaml and trainer.yaml for real: two compose projects and networks, only published ports between.

Weights cross by `disk` over HTTP. In mid-run the mirror beside the engines is killed: training goes on up
to the staleness bound and no further, goes on once the mirror is back, and the ledger's audit closes."""

from __future__ import annotations

import os

import pytest

from compose_project import PROMPTS, STEPS, Compose, audit, until_bound, until_committed

pytestmark = [
    pytest.mark.compose,
    pytest.mark.skipif(
        os.environ.get("MILEPOST_COMPOSE") != "1", reason="needs Docker: run `make compose-test`"
    ),
    pytest.mark.timeout(2400),
]


async def test_a_run_over_two_hosts_survives_its_mirror(hosts: tuple[Compose, Compose]) -> None:
    rollout, trainer = hosts
    await rollout.up()
    await trainer.up()
    async with rollout.buffer() as buffer:
        stats = await until_committed(buffer, 3, within_s=240)
        assert stats.weight_label  # trained weights crossed, and were served

        await rollout.kill("mirror")
        held = await until_bound(buffer, within_s=60)
        assert held.committed_step < STEPS
        await rollout.up("mirror")
        await until_committed(buffer, STEPS, within_s=400)
    assert await trainer.exited("trainer", within_s=90) == 0

    report = await audit(rollout, "/runs/demo")
    assert not report["problems"]
    assert (report["lost"], report["twice"], report["in_flight"]) == (0, 0, 0)
    assert report["accepted"] == PROMPTS == report["trained"] + sum(report["dropped"].values())
    assert (await trainer.state("weights"))["State"] == "running"
