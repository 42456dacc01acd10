"""Writes what each extra of pyproject.toml needs, one file an extra, for the layers of the images.

    python scripts/requirements.py pyproject.toml FOLDER    # FOLDER/common.txt, FOLDER/buffer.txt, ...

A layer that is made from such a file is made again when a requirement changes, and not when anything else in
pyproject.toml or the code does. Standard library alone: it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

_OURSELVES = re.compile(r"milepost\[(?P<extras>[\w,-]+)\]")


def requirements(base: Sequence[str], extras: Mapping[str, Sequence[str]], extra: str) -> list[str]:
    """What `milepost[extra]` needs, the base and the extras that it names included; sorted, each once."""
    needed = set(base)
    for line in extras[extra]:
        named = _OURSELVES.fullmatch(line)
        if named:
            for other in named["extras"].split(","):
                needed.update(requirements(base, extras, other))
        else:
            needed.add(line)
    return sorted(needed)


def main(pyproject: Path, folder: Path) -> None:
    """Writes FOLDER/<extra>.txt for each extra."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    folder.mkdir(parents=True, exist_ok=True)
    for extra in extras:
        lines = requirements(project["dependencies"], extras, extra)
        (folder / f"{extra}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
