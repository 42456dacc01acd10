"""Generates the Python stubs of `protos/` into `clients/milepost/v1/`, or checks that they are current.

    python scripts/generate_stubs.py            write
    python scripts/generate_stubs.py --check    exit 1 and name the files that differ

The generator versions are pinned in pyproject.toml, so the output is the same bytes on every machine.
"""

from __future__ import annotations

import argparse
import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
TARGET = ROOT / "clients" / "milepost" / "v1"


def generate(out: Path) -> list[Path]:
    """Runs protoc for every proto file; returns the files written below `out`."""
    sources = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.rglob("*.proto"))
    bin_dir = Path(sys.executable).parent
    command = [
        sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}",
        f"--python_out={out}", f"--grpc_python_out={out}",
        f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}", f"--mypy_out={out}",
        f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}", f"--mypy_grpc_out={out}",
        *sources,
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=120)
    return sorted((out / "milepost" / "v1").iterdir())


def main() -> int:
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit 1 when stubs are out of date"
    )
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as tmp:
        files = generate(Path(tmp))
        stale = [f for f in files if not _same(f, TARGET / f.name)]
        if check:
            for f in stale:
                print(f"clients/milepost/v1/{f.name} is out of date; run `make protos`", file=sys.stderr)
            return 1 if stale else 0
        for f in stale:
            (TARGET / f.name).write_bytes(f.read_bytes())
        print(f"{len(files)} stubs, {len(stale)} written")
    return 0


def _same(a: Path, b: Path) -> bool:
    return b.exists() and filecmp.cmp(a, b, shallow=False)


if __name__ == "__main__":
    sys.exit(main())
