"""rollout.yaml and trainer.yaml for real: two compose projects and networks, only published ports between.

Weights cross by `disk` over HTTP. In mid-run the mirror beside the engines is killed: training goes on up
to the staleness bound and no further, and goes on once the mirror is back. Then the trainer is cut off its
network: rollouts fill up to the bound and wait. The ledger's audit closes.

Runs under `make compose-test` alone."""

from __future__ import annotations

from compose_project import (
    MARKS,
    Compose,
    assert_audit_closes,
    at_rest,
    until_bound,
    until_committed,
    until_full,
    until_goes_on,
)
from milepost import BufferClient
from milepost.types import RunStats

pytestmark = MARKS


async def test_a_run_over_two_hosts_survives_its_mirror_and_its_cable(hosts: tuple[Compose, Compose]) -> None:
    rollout, trainer = hosts
    await rollout.up()
    await trainer.up()
    async with rollout.buffer() as buffer:
        stats = await until_committed(buffer, 3)
        assert stats.weight_label  # trained weights crossed, and were served

        await rollout.kill("mirror")
        held = await until_bound(buffer)
        assert held.committed_step < rollout.steps
        await rollout.up("mirror")
        await until_goes_on(buffer)

        cut = await _cut_off_between_publications(rollout, trainer, buffer)
        full = await until_full(buffer)
        assert full.committed_step == cut.committed_step < rollout.steps
        await trainer.reconnect("trainer")
        await until_committed(buffer, rollout.steps)
    assert await trainer.exited("trainer") == 0

    await assert_audit_closes(rollout)
    for host in hosts:
        await host.call("stop")
        ends = {service: state["ExitCode"] for service, state in (await host.states()).items()}
        assert ends == dict.fromkeys(ends, 0), "a container did not stop in order"


async def _cut_off_between_publications(rollout: Compose, trainer: Compose, buffer: BufferClient) -> RunStats:
    """Cuts the trainer off while engines serve: in mid-publication they would have to wait for it."""
    for _ in range(5):
        await trainer.cut_off("trainer")
        cut = await at_rest(buffer)
        if {engine["state"] for engine in (await rollout.fleet()).values()} == {"serving"}:
            return cut
        await trainer.reconnect("trainer")
        await until_goes_on(buffer)
    raise AssertionError("cut off five times, each time in the middle of a publication")
