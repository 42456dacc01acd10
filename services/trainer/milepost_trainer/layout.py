"""The layout of a packed row: where each sequence starts, and how attention may cut the row up.

Owned by the micro-batch, built once for it, read by the attention function of every layer. Kernels with
variable lengths need ``cu_seqlens`` and ``extent`` alone; rectangles are cut when a kernel first asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class PaddedBlock:
    """Sequences of like length as a rectangle.

    Attributes:
        gather: int64 [n * L] index into the packed row for each cell; cells past a sequence's end repeat its
            last.
        num_sequences: n.
        length: L, the longest of them.
        rows: int64 [t] packed positions that the block owns.
        cells: int64 [t] cell of the rectangle for each of ``rows``; None when every cell is real.
    """

    gather: torch.Tensor
    num_sequences: int
    length: int
    rows: torch.Tensor
    cells: torch.Tensor | None


@dataclass(eq=False)  # not frozen: torch.compile takes frozen ones apart and compiles anew for every length
class PackedLayout:
    """Sequences of a packed row. Nobody changes it.

    Attributes:
        lengths: tokens of each sequence.
        cu_seqlens: int32 [S + 1] running sum of lengths, as variable-length kernels want it, on the device.
        num_tokens: T, the sum of the lengths.
        extent: int32 [1] the longest of them, on the host: kernels want it as a number, and a number would
            be compiled in.
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor

    def __post_init__(self) -> None:
        """Derive what never changes device."""
        self.num_tokens = sum(self.lengths)
        self.extent = torch.tensor([max(self.lengths)], dtype=torch.int32)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], *, device: torch.device | None = None) -> PackedLayout:
        """Lay out sequences end to end.

        Args:
            lengths: tokens of each sequence, all at least 1.
            device: where the index tensors go.

        Raises:
            ValueError: there is no sequence or an empty one.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(
                f"lengths is {list(lengths)}: name at least one sequence, each of at least 1 token"
            )
        ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
        return cls(tuple(lengths), ends.to(device=device, dtype=torch.int32))

    @cached_property
    def blocks(self) -> tuple[PaddedBlock, ...]:
        """The sequences as rectangles, for kernels without variable lengths; at most half is padding."""
        sizes = torch.tensor(self.lengths, dtype=torch.int64)
        starts = sizes.cumsum(0) - sizes
        device = self.cu_seqlens.device
        return tuple(
            _block(starts[members], sizes[members], device) for members in _like_lengths(self.lengths)
        )

    @cached_property
    def restore(self) -> torch.Tensor | None:
        """Where each packed position stands among the blocks' rows laid end to end.

        int64 [T]; None when one block holds the row as it is.
        """
        whole = len(self.blocks) == 1 and self.blocks[0].cells is None
        return None if whole else torch.cat([block.rows for block in self.blocks]).argsort()


def _like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Split sequences into classes in which the longest is less than twice the shortest."""
    classes: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not classes or lengths[index] * 2 <= longest:
            classes.append([])
            longest = lengths[index]
        classes[-1].append(index)
    return [sorted(members) for members in classes]


def _block(starts: torch.Tensor, sizes: torch.Tensor, device: torch.device) -> PaddedBlock:
    length = int(sizes.max())
    column = torch.arange(length)
    gather = (starts[:, None] + torch.minimum(column[None], sizes[:, None] - 1)).reshape(-1)
    real = (column[None] < sizes[:, None]).reshape(-1)
    cells = None if bool(real.all()) else real.nonzero()[:, 0]
    rows = gather if cells is None else gather[cells]
    return PaddedBlock(
        gather=gather.to(device),
        num_sequences=int(sizes.numel()),
        length=length,
        rows=rows.to(device),
        cells=None if cells is None else cells.to(device),
    )
