"""Writes the table of all metrics into docs/telemetry.md, from the specs that the services export by.

python scripts/metrics_reference.py            write it
python scripts/metrics_reference.py --check    fail when it is not what would be written
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from milepost_common.metrics import Kind, Spec
from milepost_common.metrics.calls import SPECS as CALLS
from milepost_common.metrics.export import INFO

TARGET = Path(__file__).resolve().parent.parent / "docs" / "telemetry.md"
BEGIN, END = "<!-- metrics: begin, written by scripts/metrics_reference.py -->", "<!-- metrics: end -->"

MODULES = {
    "buffer": "milepost_buffer.metrics",
    "router": "milepost_router.metrics",
    "rollout": "milepost_rollout.metrics",
    "trainer": "milepost_trainer.meters",
    "engine": "milepost_engine.metrics",
}


def specs() -> dict[str, Sequence[Spec]]:
    """Every metric by the service that exports it; `every service` for those of all of them."""
    found: dict[str, Sequence[Spec]] = {
        service: importlib.import_module(module).SPECS for service, module in MODULES.items()
    }
    return found | {"every service": (INFO, *CALLS)}


def main() -> int:
    """Writes or checks the table; returns the exit status."""
    text = TARGET.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        print(f"{TARGET.name} lacks the lines around the metrics: {BEGIN} {END}", file=sys.stderr)
        return 1
    wanted = "\n".join([head + BEGIN, "", *_pages(), END + tail])
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(wanted, encoding="utf-8")
        return 0
    if wanted == text:
        return 0
    print(f"{TARGET.name} is not what the metrics say: run `make docs` and commit it", file=sys.stderr)
    return 1


def _pages() -> Iterator[str]:
    for service, listed in specs().items():
        yield f"### {service.capitalize()}\n"
        yield "| metric | type | labels | unit | meaning | when it looks bad |"
        yield "|---|---|---|---|---|---|"
        yield from (_row(spec) for spec in listed)
        yield ""


def _row(spec: Spec) -> str:
    name = f"`{spec.prometheus_name}`"
    if "/" in spec.name:
        name += f" (`{spec.name}`)"
    labels = ", ".join(f"`{label}`" for label in spec.labels)
    kind = "counter" if spec.kind is Kind.COUNTER else spec.kind.value
    unit = {"1": "", "By": "bytes"}.get(spec.unit, spec.unit)
    return f"| {name} | {kind} | {labels} | {unit} | {_cell(spec.means)} | {_cell(spec.when_bad)} |"


def _cell(text: str) -> str:
    return (text[:1].upper() + text[1:]).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
