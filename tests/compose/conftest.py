"""The images, built one at a time, and compose projects of our own, which are removed with their volumes
whatever happens. `make compose-test` sets MILEPOST_COMPOSE."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from compose_project import BUILD_S, FOLDER, Compose, gateway, remove, variables

IMAGES = ("buffer", "router", "rollout", "engine-1", "trainer")
NAME = f"milepost-test-{os.getpid()}"


@pytest.fixture(scope="session")
def images() -> None:
    """Every image, as the working tree has it."""

    async def build() -> None:
        compose = Compose(name=NAME, file=FOLDER / "cpu.yaml", variables=variables(steps=1))
        for service in IMAGES:
            await compose.call("build", service, timeout_s=BUILD_S)

    asyncio.run(build())


@pytest.fixture
async def project(images: None) -> AsyncIterator[Compose]:
    """cpu.yaml, not up yet; steps enough to go on for while containers die one after the other."""
    compose = Compose(name=NAME, file=FOLDER / "cpu.yaml", variables=variables(steps=200))
    try:
        yield compose
    finally:
        await remove(compose)


@pytest.fixture
async def hosts(images: None) -> AsyncIterator[tuple[Compose, Compose]]:
    """rollout.yaml and trainer.yaml, not up yet: two networks, joined by ports on Docker's bridge."""
    here = await gateway()
    addresses = {"BIND": here, "TRAINER_HOST": here, "ROLLOUT_HOST": here}
    both = variables(steps=60) | addresses | {"COMPOSE_PROFILES": "cpu"}
    rollout = Compose(name=f"{NAME}-rollout", file=FOLDER / "rollout.yaml", variables=both)
    trainer = Compose(name=f"{NAME}-trainer", file=FOLDER / "trainer.yaml", variables=both)
    try:
        yield rollout, trainer
    finally:
        try:
            await remove(trainer)
        finally:
            await remove(rollout)
