"""cpu.yaml with containers taken off their network in mid-run, and then stopped and started as a whole.

A container that is cut off lives on and hears nothing, not even that its connections are gone. Runs under
`make compose-test` alone."""

from __future__ import annotations

from compose_project import MARKS, PATIENCE_S, Compose, assert_audit_closes, until_committed, until_goes_on
from stack import until

pytestmark = MARKS

FED_IN_PART = 143  # ended by SIGTERM, by itself
SERVICES = ("redis", "buffer", "router", "engine-1", "engine-2", "rollout", "trainer")


async def test_router_and_engine_are_cut_off_and_the_run_goes_on(project: Compose) -> None:
    await project.up()
    async with project.buffer() as buffer:
        await until_committed(buffer, 3)
        await as_it_should_be(project)

        await project.cut_off("router")
        await until_state(project, "dead", "engine-1", "engine-2")
        await project.reconnect("router")
        await until_state(project, "serving", "engine-1", "engine-2")
        await until_goes_on(buffer)

        await project.cut_off("engine-1")
        await until_state(project, "dead", "engine-1")
        await until_goes_on(buffer)  # by the other engine
        await project.reconnect("engine-1")
        await until_state(project, "serving", "engine-1", "engine-2")

        stats = await until_goes_on(buffer)
        assert stats.committed_step < project.steps, "the run was over before it was stopped"
    await project.call("stop")
    ends = {service: state["ExitCode"] for service, state in (await project.states()).items()}
    assert ends == dict.fromkeys(ends, 0) | {"feeder": FED_IN_PART}, "a container did not stop in order"

    await project.up()
    async with project.buffer() as buffer:
        await until_committed(buffer, project.steps)
    assert await project.exited("trainer") == 0
    await assert_audit_closes(project)


async def as_it_should_be(project: Compose) -> None:
    """Every service is healthy, none runs as root, and all that is kept is in volumes with names."""

    async def healthy() -> bool:
        states = await project.states(*SERVICES)
        return all(state["Health"] == "healthy" for state in states.values())

    await until("every service is healthy", healthy, within_s=PATIENCE_S)
    users = {service: await project.user_of(service) for service in SERVICES}
    assert 0 not in users.values(), users
    assert await project.volumes() == {f"{project.name}_redis", f"{project.name}_runs"}


async def until_state(project: Compose, state: str, *engines: str) -> None:
    """Waits until the router has all these engines in a state."""

    async def check() -> bool:
        fleet = await project.fleet()
        return all(fleet[engine]["state"] == state for engine in engines)

    await until(f"{' and '.join(engines)} {state}", check, within_s=PATIENCE_S)
