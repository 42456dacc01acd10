"""Results as JSON, as a table, and as the measured part of docs/benchmarks/cpu.md.

    python -m benchmarks.report [runs/bench/results.json]      # puts the results into the page

The page is filled from the file alone, between two marks; nobody types numbers into it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, Size

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "cpu.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
_PACKAGES = ("grpcio", "protobuf", "numpy", "uvloop", "httptools", "uvicorn", "redis", "sglang-router")


def write(path: Path, rows: Sequence[Row], *, size: Size) -> None:
    """Writes the results with all that is needed to judge them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--untracked-files=no").splitlines()),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **_versions()},
        "size": {"runs": size.runs, "scale": size.scale},
        "rows": [row.as_json() for row in rows],
    }
    path.write_text(json.dumps(results, indent=2) + "\n")


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    lines = [f"{'name':16} {'ours':>9} {'reference':>9} {'ratio':>7} {'target':>7}  met  unit, reference"]
    for row in rows:
        target, met = _judgement(row.target, row.met)
        numbers = f"{row.ours:9.2f} {row.reference:9.2f} {row.ratio:7.3f} {target:>7}  {met:3}"
        lines.append(f"{row.name:16} {numbers}  {row.unit}; {row.compared}")
    return "\n".join(lines)


def page_part(results: dict[str, Any]) -> str:
    """The measured part of the page."""
    machine, versions = results["machine"], results["versions"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}; load average "
        f"{machine['load_average']} at the end; {results['at']}, commit `{results['commit'][:12]}`"
        + (f" with {results['changed_files']} changed files" if results["changed_files"] else "")
        + f"; medians of {results['size']['runs']} runs.",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
        "| row | ours | reference | unit | ratio | target | met | reference is |",
        "|---|---:|---:|---|---:|---:|---|---|",
    ]
    for row in results["rows"]:
        target, met = _judgement(row["target"], row["met"])
        numbers = f"{row['ours']:.2f} | {row['reference']:.2f} | {row['unit']} | {row['ratio']:.3f}"
        lines.append(f"| {row['name']} | {numbers} | {target} | {met} | {row['compared']} |")
    return "\n".join(lines)


def fill_page(results: dict[str, Any], page: Path = PAGE) -> None:
    """Puts the results between the page's marks."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{page}: there is no {BEGIN} ... {END} in it; put the two marks back")
    page.write_text(f"{before}{BEGIN}\n{page_part(results)}\n{END}{after}")


def _judgement(target: float | None, met: bool) -> tuple[str, str]:
    return ("-", "-") if target is None else (f"{target:g}", "yes" if met else "NO")


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=30, cwd=PAGE.parent.parent.parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    fill_page(json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bench/results.json").read_text()))
