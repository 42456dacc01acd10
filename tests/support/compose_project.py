"""A docker compose project: bring it up, look at it, kill parts of it. Everything here has a deadline."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from milepost import BufferClient
from milepost.types import RunStats
from stack import until

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "compose"
BUILD_S, UP_S, CALL_S = 900.0, 600.0, 120.0
PATIENCE_S = 600.0  # of one wait: for a machine that does other work as well
RUN_ID = "demo"
GROUPS_PER_STEP = 32
MAX_STALENESS = 2
MARKS = [
    pytest.mark.compose,
    pytest.mark.skipif(
        os.environ.get("MILEPOST_COMPOSE") != "1", reason="needs Docker: run `make compose-test`"
    ),
    pytest.mark.timeout(2400),
]


def has_compose() -> bool:
    """Whether `docker compose` is a command here; where containers are tested it must be."""
    if os.environ.get("MILEPOST_COMPOSE") == "1":
        return True
    if docker := shutil.which("docker"):
        asked = subprocess.run([docker, "compose", "version"], capture_output=True, timeout=CALL_S)
        return not asked.returncode
    return False


@dataclass(frozen=True)
class Compose:
    """A compose project.

    Attributes:
      name: of the project; no other has it.
      file: the compose file.
      variables: what the file reads from the environment.
    """

    name: str
    file: Path
    variables: Mapping[str, str]

    @property
    def steps(self) -> int:
        """Steps of the run until its prompts are used up."""
        return int(self.variables["DEMO_PROMPTS"]) // GROUPS_PER_STEP

    async def call(self, *args: str, timeout_s: float = CALL_S, check: bool = True) -> tuple[int, str]:
        """Runs `docker compose ARGS...`; returns its exit status and what it printed to stdout."""
        command = ["docker", "compose", "--file", str(self.file), "--project-name", self.name]
        return await docker(*command[1:], *args, env=self.variables, timeout_s=timeout_s, check=check)

    async def up(self, *services: str) -> None:
        """Starts services and those they need, from images that are there."""
        await self.call("up", "--detach", "--pull", "never", "--no-build", *services, timeout_s=UP_S)

    async def kill(self, service: str) -> None:
        """SIGKILL, and proof that it is gone."""
        await self.call("kill", service)
        state = await self.state(service)
        assert (state["State"], state["ExitCode"]) == ("exited", 137), state

    async def states(self, *services: str) -> dict[str, dict[str, Any]]:
        """service -> what compose says of its container; of all services where none is named."""
        _, said = await self.call("ps", "--all", "--format", "json", *services)
        containers = [json.loads(line) for line in said.splitlines() if line.strip()]
        return {container["Service"]: container for container in containers}

    async def state(self, service: str) -> dict[str, Any]:
        """What compose says of a service's one container."""
        return (await self.states(service))[service]

    async def cut_off(self, service: str) -> None:
        """Takes a container off its network: nothing reaches it, and what it sends reaches nobody."""
        await docker("network", "disconnect", self._network, (await self.state(service))["ID"])

    async def reconnect(self, service: str) -> None:
        """Puts a container that was cut off back, under the name that the others know."""
        container = (await self.state(service))["ID"]
        await docker("network", "connect", "--alias", service, self._network, container)

    @property
    def _network(self) -> str:
        return f"{self.name}_default"

    async def user_of(self, service: str) -> int:
        """The user id of a container's first process."""
        _, said = await self.call("exec", "-T", service, "stat", "--format", "%u", "/proc/1")
        return int(said)

    async def volumes(self) -> set[str]:
        """Names of the volumes that the project's containers have mounted; a nameless one has a hash."""
        ids = [state["ID"] for state in (await self.states()).values()]
        template = '{{range .Mounts}}{{if eq .Type "volume"}}{{.Name}} {{end}}{{end}}'
        return set((await docker("inspect", "--format", template, *ids))[1].split())

    async def fleet(self) -> dict[str, dict[str, Any]]:
        """engine -> what the router says of it; asked inside its container, so also while it is cut off."""
        command = ["milepost", "engines", "--router", "127.0.0.1:7102", "--json"]
        _, said = await self.call("exec", "-T", "router", *command)
        return {engine["engine_id"]: engine for engine in json.loads(said)["engines"]}

    async def exited(self, service: str) -> int:
        """Waits until a container has ended by itself; returns its exit status."""

        async def check() -> dict[str, Any] | None:
            state = await self.state(service)
            return state if state["State"] == "exited" else None

        return int((await until(f"{service} has ended", check, within_s=PATIENCE_S))["ExitCode"])

    @asynccontextmanager
    async def buffer(self) -> AsyncIterator[BufferClient]:
        """A client of the buffer, through its published port."""
        _, at = await self.call("port", "buffer", "7101")
        async with BufferClient(at.strip()) as client:
            yield client

    async def logs(self) -> str:
        """The end of every log, for failures."""
        return (await self.call("logs", "--no-color", "--tail", "30", check=False))[1]


async def docker(
    *args: str, env: Mapping[str, str] | None = None, timeout_s: float = CALL_S, check: bool = True
) -> tuple[int, str]:
    """Runs `docker ARGS...`; it is killed at the deadline, and fails the test where `check` is set."""
    process = await asyncio.create_subprocess_exec(
        "docker",
        *args,
        env={**os.environ, **(env or {})},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    except TimeoutError:
        pytest.fail(f"docker {' '.join(args)}: not within {timeout_s:.0f} s")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    said = out.decode(errors="replace")
    if check and process.returncode:
        pytest.fail(f"docker {' '.join(args)}: {process.returncode}\n{said[-3000:]}\n{err.decode()[-3000:]}")
    return process.returncode or 0, said


PORTS = ("BUFFER", "ROUTER", "ROUTER_HTTP", "ROLLOUT", "TRAINER", "MIRROR", "WEIGHTS")


def variables(*, steps: int) -> dict[str, str]:
    """A short run on ports of its own; torch from pip's folder of wheels where there is one."""
    short = {"DEMO_PROMPTS": str(steps * GROUPS_PER_STEP), "DEMO_WARM_START_STEPS": "60"}
    torch = {"MILEPOST_TORCH_INDEX": ""} if os.environ.get("PIP_FIND_LINKS") else {}
    return short | free_ports() | torch


def free_ports() -> dict[str, str]:
    """Different free ports of this machine: a container that is started again has the same one again."""
    with ExitStack() as stack:
        sockets = {port: stack.enter_context(socket.socket()) for port in PORTS}
        for taken in sockets.values():
            taken.bind(("", 0))
        return {f"{port}_PORT": str(taken.getsockname()[1]) for port, taken in sockets.items()}


async def gateway() -> str:
    """This machine's address as containers of every network reach it: the bridge's, by rule its first."""
    _, said = await docker("network", "inspect", "bridge", "--format", "{{json (index .IPAM.Config 0)}}")
    config = json.loads(said)
    return config.get("Gateway") or str(ipaddress.ip_network(config["Subnet"])[1])


async def remove(compose: Compose) -> None:
    """Prints the logs, which pytest shows where the test failed, and removes the project and its volumes."""
    try:
        print(await compose.logs())
    finally:
        await compose.call("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "10")


async def assert_audit_closes(compose: Compose) -> None:
    """The ledger's audit, by the service that the compose file has for it, against the witnesses on disk."""
    command = ["ledger", "--run", RUN_ID, "--buffer", "buffer:7101", "--audit", "--witness", "/runs/demo"]
    _, said = await compose.call("run", "--rm", "--no-deps", "audit", *command, "--json")
    report = json.loads(said)
    assert not report["problems"]
    assert (report["lost"], report["twice"], report["in_flight"]) == (0, 0, 0)
    assert report["accepted"] == int(compose.variables["DEMO_PROMPTS"])
    assert report["accepted"] == report["trained"] + sum(report["dropped"].values())


async def stats_of(buffer: BufferClient) -> RunStats | None:
    """Counts of the run; None while there is none."""
    found = await buffer.get_stats(RUN_ID)
    return found[0] if found else None


async def until_committed(buffer: BufferClient, step: int) -> RunStats:
    """Waits until a step is committed."""

    async def check() -> RunStats | None:
        stats = await stats_of(buffer)
        return stats if stats and stats.committed_step >= step else None

    return await until(f"step {step} committed", check, within_s=PATIENCE_S)


async def until_goes_on(buffer: BufferClient) -> RunStats:
    """Waits until two more steps than now are committed: one may have been about to be."""
    stats = await until_committed(buffer, 0)
    return await until_committed(buffer, stats.committed_step + 2)


async def at_rest(buffer: BufferClient) -> RunStats:
    """Counts after the trainer was cut off: asked until what it had sent before is through."""
    before = await until_committed(buffer, 0)
    after = await until_committed(buffer, 0)
    while after.committed_step > before.committed_step:
        before, after = after, await until_committed(buffer, 0)
    return after


async def order_of(buffer: BufferClient) -> dict[tuple[int, int], str]:
    """(step, position) -> prompt_id of every group that a step has taken."""
    return {(r.step, r.position): r.prompt_id async for r in buffer.get_ledger(RUN_ID) if r.step}


async def until_bound(buffer: BufferClient) -> RunStats:
    """Waits until training has come as far as the staleness bound lets it without new weights."""

    async def check() -> RunStats | None:
        stats = await stats_of(buffer)
        return stats if stats and stats.committed_step == stats.weight_label + 1 + MAX_STALENESS else None

    return await until("the staleness bound is reached", check, within_s=PATIENCE_S)


async def until_full(buffer: BufferClient) -> RunStats:
    """Waits until no further group may roll and none does: all that the bound admits waits for a trainer."""

    async def check() -> RunStats | None:
        stats = await stats_of(buffer)
        full = stats and not stats.rolling and not stats.admissible
        return stats if full else None

    return await until("rollouts have filled up to the bound", check, within_s=PATIENCE_S)
