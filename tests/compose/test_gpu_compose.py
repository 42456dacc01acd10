"""The compose files for GPUs, as `docker compose config` renders them.

What CUDA IPC and NCCL need is there. In these files and in those for CPUs, every service's settings are read
by that service's own class. Needs the command `docker compose`, no engine and no GPU.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from compose_project import FOLDER, has_compose
from milepost_buffer.settings import BufferSettings
from milepost_common.settings import ServiceSettings, load
from milepost_engine.settings import EngineSettings
from milepost_engine.settings import from_command_line as engine_settings
from milepost_engine.sglang_options import arguments
from milepost_rollout.settings import RolloutSettings
from milepost_router.settings import RouterSettings
from milepost_trainer.settings import TrainerSettings
from stack import MILEPOST, ROOT

pytestmark = pytest.mark.skipif(not has_compose(), reason="`docker compose` is not a command here")

CONFIG = "/etc/milepost/milepost.toml"
HOSTS = {"TRAINER_HOST": "10.0.0.2", "ROLLOUT_HOST": "10.0.0.1"}
KINDS: Mapping[str, type[ServiceSettings]] = {
    "buffer": BufferSettings,
    "router": RouterSettings,
    "rollout": RolloutSettings,
    "trainer": TrainerSettings,
    "engine": EngineSettings,
}
PROJECTS = [
    pytest.param("cpu.yaml", {}, id="cpu"),
    pytest.param("one-gpu.yaml", {}, id="one-gpu"),
    pytest.param("gpu.yaml", {"COMPOSE_PROFILES": "second"}, id="gpu"),
    pytest.param("rollout.yaml", HOSTS | {"COMPOSE_PROFILES": "cpu"}, id="rollout-cpu"),
    pytest.param("rollout.yaml", HOSTS | {"COMPOSE_PROFILES": "gpu"}, id="rollout-gpu"),
    pytest.param("trainer.yaml", HOSTS | {"COMPOSE_PROFILES": "cpu"}, id="trainer-cpu"),
    pytest.param("trainer.yaml", HOSTS | {"COMPOSE_PROFILES": "gpu"}, id="trainer-gpu"),
]
CUDA_IMAGES = ("milepost/trainer-cuda:latest", "milepost/engine-sglang:latest")


def config(file: str, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`docker compose config`, with these variables and none of ours."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")}
    command = ["docker", "compose", "--file", str(FOLDER / file), "config", "--format", "json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=kept | dict(variables))


def rendered(file: str, **variables: str) -> dict[str, Any]:
    """The project as compose would start it."""
    done = config(file, variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Image:
    """What the last stage of a Dockerfile says of the container."""

    user: str
    environment: Mapping[str, str]
    health: tuple[str, ...]


@cache
def image_of(dockerfile: str) -> Image:
    text = (ROOT / dockerfile).read_text()
    last = text[text.rindex("\nFROM ") :].replace("\\\n", " ")
    lines = [line.split(None, 1) for line in last.splitlines() if " " in line]
    words = [w for key, rest in lines if key == "ENV" for w in shlex.split(rest)]
    health = [json.loads(rest[rest.index("[") :]) for key, rest in lines if key == "HEALTHCHECK"]
    (user,) = [rest for key, rest in lines if key == "USER"]
    return Image(user, dict(w.split("=", 1) for w in words if w.startswith("MILEPOST_")), tuple(health[-1]))


def servers(project: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], Image]]:
    """(name, service, image) of every `milepost SERVICE serve`."""
    for name, service in project["services"].items():
        command = service.get("command") or [""]
        if command[0] in KINDS and command[1:2] == ["serve"]:
            yield name, service, image_of(service["build"]["dockerfile"])


def settings_of(service: Mapping[str, Any], image: Image, patch: pytest.MonkeyPatch) -> Any:
    """The service's settings, read as it would read them in its container."""
    kind, _, *flags = service["command"]
    (source,) = [v["source"] for v in service["volumes"] if v["target"] == CONFIG]
    flags = [source if flag == CONFIG else flag for flag in flags]
    environ = image.environment | {k: str(v) for k, v in service["environment"].items()}
    if kind != "engine":
        return load(KINDS[kind], flags, environ=environ)
    with patch.context() as scope:  # its flags are spelled in two ways, which its own reader knows
        for key, value in environ.items():
            scope.setenv(key, value)
        return engine_settings(flags)


def seconds(duration: str) -> float:
    parts = re.findall(r"(\d+)(h|m|s)", duration)
    return float(sum(int(n) * {"h": 3600, "m": 60, "s": 1}[unit] for n, unit in parts))


@pytest.mark.parametrize(("file", "variables"), PROJECTS)
def test_every_service_reads_its_settings(
    file: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(servers(rendered(file, **variables)))
    assert found
    for name, service, image in found:
        settings = settings_of(service, image, monkeypatch)
        deadline = getattr(settings, "shutdown_timeout_s", 30.0)
        assert seconds(service["stop_grace_period"]) > deadline, f"{name} is killed while it stops"
        if isinstance(settings, EngineSettings):
            host = service["environment"]["MILEPOST_ENGINE__ADVERTISE"].removeprefix("http://")
            assert (settings.host, host) == ("0.0.0.0", f"{name}:{settings.port}")
            assert settings.engine_id == name
            if settings.backend == "sglang":
                assert "--context-length" in arguments(settings, port=settings.port, release="0.5.21")


@pytest.mark.parametrize(("file", "variables"), PROJECTS)
def test_health_is_asked_where_the_service_listens(
    file: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, service, image in servers(rendered(file, **variables)):
        program, *rest = service.get("healthcheck", {}).get("test", ["CMD", *image.health])[1:]
        settings = settings_of(service, image, monkeypatch)
        port = settings.port if isinstance(settings, EngineSettings) else int(settings.listen.split(":")[1])
        assert f"127.0.0.1:{port}" in rest[1], f"{name} listens at {port}"
        asked = subprocess.run([MILEPOST, *rest], timeout=100, capture_output=True)
        assert program == "milepost"
        assert asked.returncode in (0, 1), "2 is a command line that is not understood"


@pytest.mark.parametrize(("file", "variables"), PROJECTS)
def test_containers_are_nobody_in_particular_and_keep_what_matters(
    file: str, variables: dict[str, str]
) -> None:
    project = rendered(file, **variables)
    for name, service in project["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert "privileged" not in service, name
        if "build" in service:
            assert image_of(service["build"]["dockerfile"]).user in ("milepost", "1000:1000"), name
        volumes = [v for v in service.get("volumes", []) if v["type"] == "volume"]
        assert {v["source"] for v in volumes} <= set(project["volumes"]), name
        assert not [v for v in service.get("volumes", []) if v["type"] == "bind" and not v.get("read_only")]


@pytest.mark.parametrize(("file", "holders"), [("one-gpu.yaml", 2), ("gpu.yaml", 3)])
def test_trainer_and_engines_share_namespaces_that_neither_owns(file: str, holders: int) -> None:
    services = rendered(file, COMPOSE_PROFILES="second")["services"]
    joined = {
        name: service for name, service in services.items() if service.get("pid") or name.startswith("engine")
    }
    assert len(joined) == holders
    for service in joined.values():
        assert service["pid"] == service["ipc"] == "service:namespaces"
        assert service["image"] in CUDA_IMAGES
        assert not service["init"], "only the first process of a namespace reaps"
        assert service["depends_on"]["namespaces"]["condition"] == "service_started"
    assert "trainer" in joined
    owner = services["namespaces"]
    assert (owner["ipc"], owner["init"]) == ("shareable", True)
    assert int(owner["shm_size"]) >= 8 << 30
    users = {image_of(s["build"]["dockerfile"]).user for s in joined.values()}
    assert users == {"1000:1000"}, "torch's counters in /dev/shm are for one user"


def devices(service: Mapping[str, Any]) -> list[dict[str, Any]]:
    reservations = service.get("deploy", {}).get("resources", {}).get("reservations", {})
    return reservations.get("devices", [])


def test_one_gpu_is_reserved_for_both() -> None:
    services = rendered("one-gpu.yaml", GPU="GPU-5d2c")["services"]
    reserved = {name: devices(service) for name, service in services.items() if devices(service)}
    wanted = {"capabilities": ["gpu"], "driver": "nvidia", "device_ids": ["GPU-5d2c"]}
    assert reserved == {name: [wanted] for name in ("init", "trainer", "engine-1")}
    assert services["trainer"]["environment"]["MILEPOST_TRAINER__PUBLISH__TRANSPORT"] == "cuda_ipc"


def test_several_gpus_go_to_one_container_each() -> None:
    services = rendered("gpu.yaml", COMPOSE_PROFILES="second", ENGINE_2_GPUS="2,3", ENGINE_TP="2")["services"]
    own = {name: services[name]["environment"] for name in ("trainer", "engine-1", "engine-2")}
    assert {name: env["CUDA_VISIBLE_DEVICES"] for name, env in own.items()} == {
        "trainer": "0", "engine-1": "1", "engine-2": "2,3",
    }  # fmt: skip
    for name, env in own.items():
        assert [d["count"] for d in devices(services[name])] == [-1], "NCCL knows no peer that it cannot see"
        assert services[name]["ulimits"]["memlock"] == -1
        assert env["NCCL_CUMEM_ENABLE"] == "0"
    assert len({env["NCCL_HOSTID"] for env in own.values()}) == 1, "one host, for NCCL too"
    assert "engine-2" not in rendered("gpu.yaml")["services"]


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("rollout.yaml", ({"engine-1", "engine-2"}, {"engine-gpu"})),
        ("trainer.yaml", ({"trainer"}, {"trainer-gpu"})),
    ],
)
def test_a_host_says_what_it_runs(file: str, own: tuple[set[str], set[str]]) -> None:
    refused = config(file, HOSTS)
    assert refused.returncode != 0
    assert "COMPOSE_PROFILES is missing a value: cpu or gpu" in refused.stderr
    cpu, gpu = (set(rendered(file, **HOSTS, COMPOSE_PROFILES=p)["services"]) for p in ("cpu", "gpu"))
    assert (cpu - gpu, gpu - cpu) == own


def test_both_configurations_are_of_one_run() -> None:
    cpu, gpu = (tomllib.loads((FOLDER / name).read_text()) for name in ("milepost.toml", "gpu.toml"))
    for table in ("run", "buffer", "router", "rollout"):
        assert cpu[table] == gpu[table], f"[{table}] is the same, whatever generates"
    for key in ("model", "router"):
        assert cpu["engine"][key] == gpu["engine"][key]


@pytest.mark.parametrize(
    "dockerfile", ["services/trainer/cuda.Dockerfile", "services/rollout/sglang.Dockerfile"]
)
def test_an_image_keeps_the_torch_of_its_base(dockerfile: str) -> None:
    text = (ROOT / dockerfile).read_text()
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, flags=re.MULTILINE))
    for file in ("one-gpu.yaml", "gpu.yaml"):
        services = rendered(file)["services"].values()
        builds = [s["build"] for s in services if s.get("build", {}).get("dockerfile") == dockerfile]
        assert builds
        assert all(build["args"] == defaults for build in builds), "compose and the Dockerfile say the same"
    if "PYTORCH_IMAGE" in defaults:
        torch = defaults["PYTORCH_IMAGE"].split(":")[1].split("-")[0]
        assert f"torch=={torch}\n" in (ROOT / "constraints.txt").read_text(), "tests run with this torch"
    assert 'test "$had" = "$(kept)"' in text, "the build fails where pip changes it"


def test_variables_of_the_compose_files_are_listed() -> None:
    said = (FOLDER / ".env.example").read_text()
    files = [*FOLDER.glob("*.yaml"), *(FOLDER / "parts").glob("*.yaml")]
    used = {name for file in files for name in re.findall(r"\$\{([A-Z][A-Z_0-9]+)", file.read_text())}
    assert used <= set(re.findall(r"^# ([A-Z][A-Z_0-9]+)=", said, flags=re.MULTILINE))
