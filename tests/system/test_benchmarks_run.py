"""Every benchmark runs at its smallest size and writes rows of the agreed shape; no number is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "wire": ["wire", "wire_types"],
    "buffer": ["buffer"],
    "router": ["router_small", "router_64k"],
    "startup": ["start_buffer", "start_router", "start_rollout"],
    "loop": ["loop_train", "loop_generate"],
}
FIELDS = {"name", "ours", "reference", "unit", "ratio", "target", "met", "compared", "runs", "more"}
MET, MISSED = 0, 1
DEADLINE_S = 550


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ROWS)
def test_rows_have_the_agreed_shape(name: str, tmp_path: Path):
    if name == "router":
        pytest.importorskip("sglang_router", reason="the peer comes with `make bench`")
    out = tmp_path / "results.json"
    done = bench("--smallest", "--only", name, "--out", str(out))
    assert done.returncode in (MET, MISSED), done.stderr[-4000:]
    results = json.loads(out.read_text())
    assert results["commit"]
    assert results["versions"]["python"]
    assert [row["name"] for row in results["rows"]] == ROWS[name]
    for row in results["rows"]:
        assert set(row) == FIELDS
        assert row["ours"] > 0
        assert row["ratio"] == pytest.approx(row["ours"] / row["reference"])
        assert row["met"] == (row["target"] is None or row["ratio"] <= row["target"])
        assert len(row["runs"]["ours"]) == len(row["runs"]["reference"]) == 1
        assert row["name"] in done.stdout
    assert done.returncode == (MET if all(row["met"] for row in results["rows"]) else MISSED)


def test_an_unknown_benchmark_is_told_the_known_ones():
    done = bench("--only", "speed")
    assert done.returncode == 2
    assert "choose from wire, buffer, router" in done.stderr
