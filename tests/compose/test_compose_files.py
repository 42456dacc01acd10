"""Compose files and Dockerfiles as files: compose understands the command in the head of each file, and
images share the layers that they are to share. Needs the command `docker compose` alone, no engine."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from compose_project import has_compose
from stack import ROOT, run

FILES = sorted((ROOT / "deploy" / "compose").glob("*.yaml"))
COMMAND = re.compile(r"docker compose ((?:(?:-f|--profile) \S+ )+)")
HOSTS = {"TRAINER_HOST": "10.0.0.2", "ROLLOUT_HOST": "10.0.0.1", "COMPOSE_PROFILES": "cpu"}
SHARED = {
    "no torch": ("buffer/Dockerfile", "router/Dockerfile", "rollout/Dockerfile"),
    "torch": ("rollout/engine.Dockerfile", "trainer/Dockerfile"),
    "CUDA": ("rollout/sglang.Dockerfile", "trainer/cuda.Dockerfile"),
}


@pytest.mark.skipif(not has_compose(), reason="`docker compose` is not a command here")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_compose_understands_the_command_in_the_head(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in HOSTS.items():
        monkeypatch.setenv(name, value)
    head = file.read_text().partition("\nname:")[0]
    commands = [said.split() for said in COMMAND.findall(head)]
    assert commands, f"{file.name}: no `docker compose -f ...` in its head"
    for command in commands:
        run("docker", "compose", *command, "config", "--quiet")
    assert any(command[-1].endswith(file.name) for command in commands)


@pytest.mark.parametrize("paths", SHARED.values(), ids=SHARED)
def test_images_of_a_kind_share_their_layers(paths: tuple[str, ...]) -> None:
    texts = [(ROOT / "services" / path).read_text() for path in paths]
    shared = {text[text.index("\nFROM ") : text.rindex("\nFROM ")] for text in texts}
    assert len(shared) == 1, f"{', '.join(paths)} differ before their last FROM"


def test_layers_are_made_of_all_that_an_extra_needs(tmp_path: Path) -> None:
    run(sys.executable, ROOT / "scripts" / "requirements.py", ROOT / "pyproject.toml", tmp_path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    written = {path.stem: path.read_text().splitlines() for path in tmp_path.iterdir()}
    assert set(written) == set(extras)
    assert set(written["cli"]) == {*project["dependencies"], *extras["cli"]}
    assert {*written["common"], *(x for x in extras["buffer"] if "redis" in x)} <= set(written["buffer"])
    assert {*written["engine"], *written["trainer"], "matplotlib>=3.9"} <= set(written["all"])
    assert not [line for lines in written.values() for line in lines if line.startswith("milepost")]
    assert not [line for name in ("buffer", "router", "rollout") for line in written[name] if "torch" in line]
