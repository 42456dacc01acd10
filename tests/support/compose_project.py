"""A docker compose project: bring it up, look at it, kill parts of it. Everything here has a deadline."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket
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
RUN_ID = "demo"
STEPS = 60
MAX_STALENESS = 2
PROMPTS = 32 * STEPS


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

    async def state(self, service: str) -> dict[str, Any]:
        """What compose says of a service's one container."""
        _, said = await self.call("ps", "--all", "--format", "json", service)
        (container,) = [json.loads(line) for line in said.splitlines() if line.strip()]
        return container

    async def exited(self, service: str, *, within_s: float) -> int:
        """Waits until a container has ended by itself; returns its exit status."""

        async def check() -> dict[str, Any] | None:
            state = await self.state(service)
            return state if state["State"] == "exited" else None

        return int((await until(f"{service} has ended", check, within_s=within_s))["ExitCode"])

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


def variables() -> dict[str, str]:
    """A short run on ports that Docker picks; torch from pip's folder of wheels where there is one."""
    short = {"DEMO_PROMPTS": str(PROMPTS), "DEMO_WARM_START_STEPS": "60"}
    torch = {"MILEPOST_TORCH_INDEX": ""} if os.environ.get("PIP_FIND_LINKS") else {}
    return short | {f"{port}_PORT": "0" for port in PORTS} | torch


def free_ports() -> dict[str, str]:
    """Different free ports of this machine, for services that must know one another's beforehand."""
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


async def audit(compose: Compose, *witnesses: str) -> dict[str, Any]:
    """The ledger's audit, by the service that the compose file has for it."""
    command = ["ledger", "--run", RUN_ID, "--buffer", "buffer:7101", "--audit", "--witness", *witnesses]
    _, said = await compose.call("run", "--rm", "--no-deps", "audit", *command, "--json")
    return json.loads(said)


async def stats_of(buffer: BufferClient) -> RunStats | None:
    """Counts of the run; None while there is none."""
    found = await buffer.get_stats(RUN_ID)
    return found[0] if found else None


async def until_committed(buffer: BufferClient, step: int, *, within_s: float) -> RunStats:
    """Waits until a step is committed."""

    async def check() -> RunStats | None:
        stats = await stats_of(buffer)
        return stats if stats and stats.committed_step >= step else None

    return await until(f"step {step} committed", check, within_s=within_s)


async def order_of(buffer: BufferClient) -> dict[tuple[int, int], str]:
    """(step, position) -> prompt_id of every group that a step has taken."""
    return {(r.step, r.position): r.prompt_id async for r in buffer.get_ledger(RUN_ID) if r.step}


async def until_bound(buffer: BufferClient, *, within_s: float) -> RunStats:
    """Waits until training has come as far as the staleness bound lets it without new weights."""

    async def check() -> RunStats | None:
        stats = await stats_of(buffer)
        return stats if stats and stats.committed_step == stats.weight_label + 1 + MAX_STALENESS else None

    return await until("the staleness bound is reached", check, within_s=within_s)
