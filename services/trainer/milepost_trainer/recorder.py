"""What is written down of each step: metrics.jsonl, steps.jsonl and TensorBoard files.

``steps.jsonl`` is a witness for the ledger's audit: the step's prompts in order, written as soon as the step
is committed. Both files are appended to, over restarts too; a replayed step has a line of its own each time,
marked as such in metrics.jsonl. A line that a crash cut off is removed before the next one. Values that are
not finite become null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from milepost.linelog import LineLog
from milepost.types import StepManifest
from milepost_trainer.checkpoint import manifest_to_json


class Recorder:
    """Appends to the files of one folder.

    Args:
        directory: where they are.
        tensorboard: also write TensorBoard event files there.
    """

    def __init__(self, directory: Path, *, tensorboard: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._metrics = LineLog(directory / "metrics.jsonl")
        self._steps = LineLog(directory / "steps.jsonl")
        self._board: Any = _open_board(directory / "tensorboard") if tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._steps.close()
        if self._board is not None:
            self._board.close()

    def write_commit(self, entry: StepManifest, *, term: int, notes: Mapping[str, int] | None = None) -> None:
        """Note which groups a step took, and what else is worth remembering of it."""
        self._steps.append(manifest_to_json(entry) | {"term": term} | dict(notes or {}))

    def write_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Note how a step went."""
        self._metrics.append({"step": step, **{name: _number(v) for name, v in metrics.items()}})
        if self._board is not None:
            for name, value in metrics.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)
            self._board.flush()


def _number(value: float | None) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, bool) else value


def _open_board(directory: Path) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(log_dir=str(directory))
