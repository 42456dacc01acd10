"""Outside witnesses for the audit, read from what clients and trainers leave on disk. No torch here.

| file                            | written by                       | says                               |
|---------------------------------|----------------------------------|------------------------------------|
| `step_*.term_*/meta.json`       | the trainer, in each checkpoint  | steps since the oldest checkpoint  |
| `steps.jsonl`                   | the trainer, after each commit   | every committed step               |
| `*.jsonl` with `accepted`       | `milepost feed --acknowledged`   | prompts that the buffer accepted   |

A folder stands for all of these in it. A line without its end, left by a crash, is told and passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from milepost.errors import InvalidArgument
from milepost.linelog import read_lines
from milepost.types import DroppedGroup, DropReason, StepManifest, Witness


def read_witnesses(paths: Sequence[str | Path], *, run_id: str) -> list[Witness]:
    """Reads files and folders; what a trainer takes out of a folder meanwhile is passed over.

    Args:
      paths: files, or folders to search.
      run_id: the run that is audited.

    Raises:
      OSError: a file cannot be read.
      InvalidArgument: a file is no witness, or of another run.
    """
    found: list[Witness] = []
    for path in map(Path, paths):
        found += _search(path, run_id) if path.is_dir() else [_read(path, run_id)]
    return found


def _search(folder: Path, run_id: str) -> list[Witness]:
    found: list[Witness] = []
    for file in _files(folder):
        with suppress(FileNotFoundError):
            found.append(_read(file, run_id))
    if not found:
        raise InvalidArgument(f"--witness {folder}: no checkpoint, steps.jsonl or acknowledged*.jsonl in it")
    return found


def _files(folder: Path) -> list[Path]:
    """Those that may be witnesses; what stands in a hidden folder is being written, or is on its way out."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=_unless_gone):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(place)
        found += [here / name for name in names if _is_witness(here, name, top=here == folder)]
    return sorted(found)


def _is_witness(folder: Path, name: str, *, top: bool) -> bool:
    if name == "meta.json":
        return top or folder.name.startswith("step_")
    return name == "steps.jsonl" or (name.startswith("acknowledged") and name.endswith(".jsonl"))


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _read(path: Path, run_id: str) -> Witness:
    try:
        if path.name != "meta.json":
            return _read_lines(path, run_id)
        content = json.loads(path.read_text(encoding="utf-8"))
        _of_run(content, run_id, path)
        return Witness(name=f"checkpoint {content['step']}", steps=tuple(map(_step, content["manifest"])))
    except InvalidArgument as error:
        error.message = error.message if "--witness" in error.message else f"--witness {error.message}"
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(
            f"--witness {path}: {type(error).__name__}: {error}; give a checkpoint's meta.json, "
            "a steps.jsonl, or a file written by `milepost feed --acknowledged`"
        ) from error


def _read_lines(path: Path, run_id: str) -> Witness:
    steps: dict[int, StepManifest] = {}
    accepted: list[str] = []
    newest_term = 0
    for number, row in read_lines(path):
        _of_run(row, run_id, path)
        if "accepted" in row:
            accepted += row["accepted"]
        elif "prompt_ids" in row:
            step, term = int(row["step"]), int(row.get("term", newest_term))
            if term > newest_term:
                # A trainer that resumed: what was behind its checkpoint is as if never trained.
                newest_term = term
                steps = {each: kept for each, kept in steps.items() if each < step}
            steps[step] = _step(row)  # a step that was trained again: the last one stands
        else:
            raise InvalidArgument(f"--witness {path}: line {number} has neither `accepted` nor `prompt_ids`")
    ordered = tuple(steps[step] for step in sorted(steps))
    return Witness(name=path.name, steps=ordered, accepted_prompt_ids=tuple(accepted))


def _of_run(row: Mapping[str, Any], run_id: str, path: Path) -> None:
    if row.get("run_id", run_id) != run_id:
        raise InvalidArgument(f"--witness {path}: of run {row['run_id']!r}; the audit is of {run_id!r}")


def _step(row: Mapping[str, Any]) -> StepManifest:
    dropped = tuple(
        DroppedGroup(prompt_id=prompt_id, reason=DropReason[reason.upper()])
        for prompt_id, reason in row.get("dropped", {}).items()
    )
    return StepManifest(step=int(row["step"]), prompt_ids=tuple(row["prompt_ids"]), dropped=dropped)
