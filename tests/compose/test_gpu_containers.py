"""What can be run of the containers for GPUs without one: their namespaces, and their images on stand-ins.

Docker has no GPU here, so the containers that share namespaces sleep instead of using them, and the images
stand on wheels that are nothing but names and versions, of torch, SGLang and what they keep with them.

Runs under `make compose-test` alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from compose_project import BUILD_S, FOLDER, MARKS, Compose, docker, remove, variables
from stack import ROOT, until

pytestmark = MARKS

IDLE = '["sh", "-c", "sleep 1001 & exec sleep 1000"]'
TORCH, TRITON, NCCL = ("torch", "2.13.0+cu130"), ("triton", "3.7.1"), ("nvidia-nccl-cu13", "2.29.7")
SGLANG_NCCL = ("nvidia-nccl-cu13", "2.30.7")  # newer than the one that torch 2.13.0 asks for
SGLANG = (("sglang", "0.5.21"), ("transformers", "5.12.1"))


@pytest.fixture
async def one_gpu(images: None, tmp_path: Path) -> AsyncIterator[Compose]:
    """The three containers of one-gpu.yaml that share namespaces, with its options, without its GPU."""
    base = f"{{file: {FOLDER / 'one-gpu.yaml'}, service: %s}}"
    sleeper = """
  {name}:
    extends: {extends}
    image: milepost/buffer:latest
    entrypoint: {idle}
    command: []
    deploy: !reset null
    healthcheck: {{disable: true}}
    stop_grace_period: 2s
    depends_on: !override {{namespaces: {{condition: service_started}}}}
"""
    text = f"services:\n  namespaces:\n    extends: {base % 'namespaces'}\n"
    for name in ("trainer", "engine-1"):
        text += sleeper.format(name=name, extends=base % name, idle=IDLE)
    file = tmp_path / "shared.yaml"
    file.write_text(text + "volumes: {runs: , engine-1: }\n")
    compose = Compose(name=f"milepost-gpu-test-{os.getpid()}", file=file, variables=variables(steps=1))
    try:
        yield compose
    finally:
        await remove(compose)


async def states(compose: Compose) -> dict[str, str]:
    return {name: state["State"] for name, state in (await compose.states()).items()}


async def seen_from(compose: Compose, service: str) -> list[str]:
    """Command lines of the processes that a container sees."""
    look = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done"
    _, said = await compose.call("exec", "-T", service, "sh", "-c", look)
    return [line.strip() for line in said.splitlines() if line.startswith("sleep 100")]


async def test_trainer_and_engine_share_memory_and_die_alone(one_gpu: Compose) -> None:
    everybody = dict.fromkeys(("namespaces", "trainer", "engine-1"), "running")
    await one_gpu.up()
    assert await states(one_gpu) == everybody
    assert sorted(await seen_from(one_gpu, "trainer")) == 2 * ["sleep 1000"] + 2 * ["sleep 1001"]
    assert await one_gpu.user_of("engine-1") == 1000, "whoever may signal all others is nobody either"
    await one_gpu.call("exec", "-T", "trainer", "sh", "-c", "umask 077 && echo 3 > /dev/shm/readers")
    _, readers = await one_gpu.call("exec", "-T", "engine-1", "cat", "/dev/shm/readers")
    assert readers.strip() == "3"

    await one_gpu.kill("trainer")
    assert await states(one_gpu) == everybody | {"trainer": "exited"}
    left = await seen_from(one_gpu, "engine-1")
    assert sorted(left) == ["sleep 1000", "sleep 1001"], "the trainer's own, its child too, and no other's"
    await one_gpu.up()
    assert await states(one_gpu) == everybody

    await one_gpu.call("kill", "namespaces")

    async def gone() -> bool:
        return "running" not in (await states(one_gpu)).values()

    await until("those who live in it end with it", gone, within_s=30)
    await one_gpu.up()
    assert await states(one_gpu) == everybody

    await one_gpu.call("stop")
    assert (await one_gpu.state("namespaces"))["ExitCode"] == 0


def write_wheel(folder: Path, name: str, version: str) -> None:
    """A distribution without anything in it."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = {
        f"{module}/__init__.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_digest(text)},{len(text)}\n" for path, text in files.items())
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in (files | {f"{info}/RECORD": record + f"{info}/RECORD,,\n"}).items():
            wheel.writestr(path, text)


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


async def stand_in(folder: Path, *packages: tuple[str, str]) -> str:
    """An image with these packages and a user 1000 of its own, as the public ones have; returns its name."""
    for name, version in packages:
        write_wheel(folder, name, version)
    (folder / "Dockerfile").write_text(
        "FROM python:3.11-slim-bookworm\nRUN useradd --uid 1000 ubuntu\nCOPY *.whl /w/\n"
        "RUN python3 -m pip install --no-deps --no-index /w/*.whl\n"
    )
    name = f"milepost-stand-in-{os.getpid()}:{folder.name.replace('_', '-').lower()[-40:]}"
    await docker("build", "--quiet", "--tag", name, str(folder), timeout_s=BUILD_S)
    return name


async def build(dockerfile: str, argument: str, *, check: bool = True) -> tuple[int, str]:
    """Builds an image; returns the exit status, and the image's name."""
    command = ["build", "--quiet", "--file", str(ROOT / dockerfile), "--build-arg", argument, str(ROOT)]
    status, said = await docker(*command, timeout_s=BUILD_S, check=check)
    return status, said.strip()


async def inside(image: str, script: str) -> list[str]:
    _, said = await docker("run", "--rm", "--network", "none", "--entrypoint", "sh", image, "-ec", script)
    return said.splitlines()


async def remove_images(*names: str) -> None:
    await docker("image", "rm", "--force", *(n for n in names if n), check=False)


async def test_the_engine_stands_on_sglangs_image(tmp_path: Path) -> None:
    base = await stand_in(tmp_path, TORCH, TRITON, SGLANG_NCCL, *SGLANG)
    _, image = await build("services/rollout/sglang.Dockerfile", f"SGLANG_IMAGE={base}")
    try:
        look = "id -u; touch $HOME/a /runs/a; echo $HOME; python3 -m pip list --format=freeze"
        user, home, *packages = await inside(image, look)
        assert (user, home) == ("1000", "/home/milepost")
        assert {f"{name}=={version}" for name, version in (TORCH, SGLANG_NCCL, *SGLANG)} <= set(packages)
        said = await inside(image, "timeout 60 milepost engine serve --model /x 2>&1 || true")
        assert any("starting sglang.launch_server" in line for line in said), said
    finally:
        await remove_images(image, base)


async def test_the_trainer_stands_on_pytorchs_image(tmp_path: Path) -> None:
    base = await stand_in(tmp_path, TORCH, TRITON, NCCL)
    _, image = await build("services/trainer/cuda.Dockerfile", f"PYTORCH_IMAGE={base}")
    try:
        look = (
            "id -u; touch $HOME/a /runs/a /weights/a; gcc -dumpversion; python3 -m pip list --format=freeze"
        )
        user, compiler, *packages = await inside(image, look)
        assert user == "1000"
        assert compiler
        assert {f"{name}=={version}" for name, version in (TORCH, TRITON, SGLANG_NCCL)} <= set(packages)
        assert "transformers==5.12.1" in packages
        _, health = await docker("inspect", "--format", "{{json .Config.Healthcheck.Test}}", image)
        assert json.loads(health) == ["CMD", "milepost", "health", "127.0.0.1:7104"]
    finally:
        await remove_images(image, base)


async def test_a_base_with_a_torch_that_is_too_old_is_refused(tmp_path: Path) -> None:
    base = await stand_in(tmp_path, ("torch", "2.5.0"), TRITON, NCCL)
    try:
        status, _ = await build("services/trainer/cuda.Dockerfile", f"PYTORCH_IMAGE={base}", check=False)
        assert status != 0, "pip put another torch in the place of the image's"
    finally:
        await remove_images(base)
