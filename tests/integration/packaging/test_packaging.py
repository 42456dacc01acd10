"""What the wheel holds, and what each extra brings along: installed alone, into an empty environment."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(400)  # of the first test of each worker: it builds the wheel

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = (
    "milepost", "milepost_common", "milepost_buffer", "milepost_router", "milepost_rollout",
    "milepost_engine", "milepost_trainer",
)  # fmt: skip
FOLDERS = {
    "milepost": "clients",
    "milepost_common": "services/common",
    "milepost_engine": "services/rollout",
}

# Imports every module of a package, then says which heavy libraries came in. The live view needs extra `cli`.
PROBE = """
import importlib, importlib.util, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith(("__main__", "cli.watch_view")):
            importlib.import_module(module.name)
print(",".join(sorted(m for m in ("torch", "redis", "transformers") if importlib.util.find_spec(m))))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT))
    return next(out.glob("*.whl"))


def run(*command: str, timeout_s: float = 120) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def source_files(package: str) -> set[str]:
    folder = FOLDERS.get(package, f"services/{package.removeprefix('milepost_')}")
    listed = run("git", "-C", str(ROOT), "ls-files", f"{folder}/{package}").splitlines()
    return {name.removeprefix(f"{folder}/") for name in listed if not name.endswith(".md")}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_holds_every_file_of_every_package(wheel: Path, package: str) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = source_files(package)
    assert f"{package}/py.typed" in expected
    assert expected <= inside


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("extra", "packages", "brings"),
    [
        ("", ["milepost"], ""),
        ("buffer", ["milepost", "milepost_buffer"], "redis"),
        ("router", ["milepost", "milepost_router"], ""),
        ("rollout", ["milepost", "milepost_rollout"], ""),
    ],
    ids=["base", "buffer", "router", "rollout"],
)
def test_an_extra_installs_alone_and_brings_no_torch(
    wheel: Path, tmp_path: Path, extra: str, packages: list[str], brings: str
) -> None:
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    wanted = f"{wheel}[{extra}]" if extra else str(wheel)
    constraint = str(ROOT / "constraints.txt")
    run(python, "-m", "pip", "install", "--quiet", "--constraint", constraint, wanted, timeout_s=300)
    assert run(python, "-c", PROBE, *packages).strip() == brings
