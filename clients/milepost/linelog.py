"""Files of JSON lines that outlive their writers: step logs, ids that were acknowledged, metrics.

A line counts once its end is written. A writer that died in mid-line leaves a tail without an end; the next
one removes exactly that tail before it appends, for two records in one line could never be read again. A tail
that lacks nothing but its end is given one. One process writes a file at a time; readers pass over the tail.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from milepost.errors import InvalidArgument

log = logging.getLogger(__name__)

_BLOCK_BYTES = 64 * 1024


class LineLog:
    """Appends to one file.

    Args:
      path: the file; it is made where it is not there.
      synced: each line is on the disk, not only with the kernel, when `append` returns.
    """

    def __init__(self, path: str | Path, *, synced: bool = False) -> None:
        self._synced = synced
        self._file = open(path, "a+b")  # noqa: SIM115  # closed by `close`
        _end_last_line(self._file, str(path))

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one line."""
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        if self._synced:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of each line; a tail without its end is told in the log and passed over.

    Raises:
      InvalidArgument: a line that has its end is no JSON.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                log.warning("%s: line %d was cut off (%d bytes); passed over", path, number, len(line))
                return
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise InvalidArgument(
                    f"{path}: line {number}: {type(error).__name__}: {error}; correct or remove it"
                ) from error


def _end_last_line(file: Any, name: str) -> None:
    """Leaves the file at the start of a line."""
    tail = _tail(file)
    if not tail:
        return
    try:
        json.loads(tail)
    except ValueError:
        file.truncate(file.seek(0, os.SEEK_END) - len(tail))
        log.warning(
            "%s: the last line was cut off when its writer died; its %d bytes are removed", name, len(tail)
        )
    else:
        file.write(b"\n")
        file.flush()


def _tail(file: Any) -> bytes:
    """What stands behind the last end of a line."""
    at, tail = file.seek(0, os.SEEK_END), b""
    while at > 0:
        size = min(at, _BLOCK_BYTES)
        at -= size
        file.seek(at)
        before, end, rest = file.read(size).rpartition(b"\n")
        tail = (rest if end else before + rest) + tail
        if end:
            break
    return tail
