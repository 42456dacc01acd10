"""The layout of a packed row: where each sequence starts, and how attention may cut the row up.

Owned by the micro-batch, built once for it, read by the attention function of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class PackedLayout:
    """Sequences of a packed row.

    Attributes:
        cu_seqlens: int32 [S + 1] running sum of lengths, as variable-length kernels want it.
        max_length: the longest sequence.
        blocks: the sequences as rectangles, for kernels without variable lengths. Padding at most doubles a
            row.
        restore: int64 [T] where each packed position stands among the blocks' rows laid end to end; None when
            one block holds the row as it is.
    """

    cu_seqlens: torch.Tensor
    max_length: int
    blocks: tuple[PaddedBlock, ...]
    restore: torch.Tensor | None

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(block.rows.numel() for block in self.blocks)

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
        sizes = torch.tensor(lengths, dtype=torch.int64)
        ends = sizes.cumsum(0)
        starts = ends - sizes
        blocks = tuple(_block(starts[members], sizes[members], device) for members in _like_lengths(lengths))
        zero = torch.zeros(1, dtype=torch.int64)
        whole = len(blocks) == 1 and blocks[0].cells is None
        restore = None if whole else torch.cat([block.rows for block in blocks]).argsort()
        return cls(
            cu_seqlens=torch.cat([zero, ends]).to(device=device, dtype=torch.int32),
            max_length=max(lengths),
            blocks=blocks,
            restore=restore,
        )


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


def _block(starts: torch.Tensor, sizes: torch.Tensor, device: torch.device | None) -> PaddedBlock:
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
