"""Copies on one GPU as a table of addresses, which one kernel goes through (see `weight_hook`).

    copies ──> what words can stand for ──> Table, run again and again
          └──> casts, what is not aligned, scattered elements, other devices ──> left to torch

A row is a block of at most BLOCK_WORDS words of 8 bytes: address of the source, address of the target, and
how many. Rows are done in no order. Addresses alone would not keep memory, so the table keeps its tensors.

The kernel is Triton's, which SGLang brings along; where it does not work, everything is left to torch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)

BLOCK_WORDS = 4096
_WORD = 8
_NO_ROWS = torch.empty((0, 3), dtype=torch.int64)

Copies = list[tuple[torch.Tensor, torch.Tensor]]
"""Where to, and where from."""


@dataclass(frozen=True)
class Table:
    """Copies that one kernel does.

    Attributes:
      rows: int64 [n, 3], on the GPU.
      copies: the tensors that its addresses are of.
    """

    rows: torch.Tensor
    copies: Copies

    def run(self) -> None:
        """Enqueues them on the current stream."""
        _run(self.rows)


def make(copies: Copies) -> tuple[Table | None, Copies]:
    """The table of copies, if it can be one, and what is left."""
    device = copies[0][0].device if copies else torch.device("cpu")
    if device.type != "cuda":
        return None, copies
    table, others = arrange(copies, device)
    if table is None:
        return None, copies
    try:
        _run(torch.zeros_like(table.rows[:1]))  # it is compiled, and copies nothing
        torch.cuda.synchronize(device)
    except Exception as error:
        log.warning("tensors are copied one by one, not by one kernel: %s: %s", type(error).__name__, error)
        return None, copies
    return table, others


def arrange(copies: Copies, device: torch.device) -> tuple[Table | None, Copies]:
    """Table and rest of copies on a device; no table where nothing fits, or where order matters."""
    here = [{target.device, source.device} == {device} for target, source in copies]
    each = [rows_of(*pair) if near else _NO_ROWS for pair, near in zip(copies, here, strict=True)]
    rows = torch.cat(each)
    if len(rows) == 0 or _overlap(rows):
        return None, copies
    taken = [pair for pair, its in zip(copies, each, strict=True) if len(its)]
    left = [pair for pair, its in zip(copies, each, strict=True) if not len(its)]
    return Table(rows.to(device), taken), left


def rows_of(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Rows, [n, 3], of a copy between tensors of one shape; none at all where words cannot stand for it."""
    if target.dtype != source.dtype or target.numel() == 0:
        return _NO_ROWS
    if target.is_contiguous() and source.is_contiguous():
        target, source = target.reshape(1, -1), source.reshape(1, -1)
    elif target.dim() != 2 or target.stride(1) != 1 or source.stride(1) != 1:
        return _NO_ROWS
    size = target.shape[1] * target.itemsize
    steps = [x.stride(0) * x.itemsize for x in (source, target)]
    starts = [x.data_ptr() for x in (source, target)]
    if any(number % _WORD for number in (size, *steps, *starts)):
        return _NO_ROWS
    lines = torch.arange(target.shape[0], dtype=torch.int64)[:, None]
    at = torch.arange(0, size, _WORD * BLOCK_WORDS, dtype=torch.int64)[None, :]
    words = ((size - at) // _WORD).clamp(max=BLOCK_WORDS).expand(len(lines), -1)
    places = [start + step * lines + at for start, step in zip(starts, steps, strict=True)]
    return torch.stack([*places, words], dim=-1).reshape(-1, 3)


def _overlap(rows: torch.Tensor) -> bool:
    """Two rows write to one place."""
    starts, order = rows[:, 1].sort()
    ends = starts + _WORD * rows[order, 2]
    return bool((ends[:-1] > starts[1:]).any())


def _run(rows: torch.Tensor) -> None:
    from milepost_engine import copy_kernel

    copy_kernel.run(rows, block=BLOCK_WORDS)
