"""The engine conformance suite against SGLang: as it is launched by default, by seed, with a memory saver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE_S = 270.0
LAUNCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "deterministic": {"enable_deterministic_inference": True},
    "memory-saver": {"enable_memory_saver": True},
}


@pytest.mark.gpu(1)
@pytest.mark.timeout(620)
@pytest.mark.parametrize("name", LAUNCHES)
def test_sglang_conforms(launch_sglang, gpu_model, out, name):
    launched = launch_sglang(f"conformance-{name}", **LAUNCHES[name])
    line = launched.ready()
    assert line.startswith("engine ready "), launched.log.read_text()[-5000:]
    report = out / f"conformance-{name}.txt"
    status = run_suite(line.split()[2], gpu_model, report)
    assert status == 0, report.read_text()[-8000:]
    assert " passed" in report.read_text()


def run_suite(url: str, model: Path, report: Path) -> int:
    """The suite as its own run of pytest, which writes to a file; returns its exit status."""
    command = [sys.executable, "-m", "pytest", "tests/contract", "-rs", "-v", "--tb=short", "-W", "default"]
    command += ["-p", "no:cacheprovider", "--timeout", "200", "--no-header", "--color=no"]
    environ = {**os.environ, "MILEPOST_ENGINE_URL": url, "MILEPOST_ENGINE_MODEL": str(model)}
    with report.open("wb") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=environ, stdout=file, stderr=file, timeout=SUITE_S, check=False
        )
    return done.returncode
