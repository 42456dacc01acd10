# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# (Triton is there only where torch has CUDA, and its language is typed for the compiler alone.)
"""The kernel that does all copies of a plan that need no cast (see ``copy_table``). Imported on CUDA only.

A program copies one row of the table: so many words from one address to another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WARPS = 4


def run(table: torch.Tensor, *, block: int) -> None:
    """Enqueues the copies of a table, which lies on the GPU, on the current stream.

    Args:
        table: int64 [n, 3]: address of the source, address of the target, number of 8-byte words.
        block: the largest number of words; a power of two.
    """
    with torch.cuda.device(table.device):
        _copy[(len(table),)](table, block, num_warps=_WARPS)


@triton.jit
def _copy(table, BLOCK: tl.constexpr):
    row = table + 3 * tl.program_id(0).to(tl.int64)
    source = tl.load(row).to(tl.pointer_type(tl.int64))
    target = tl.load(row + 1).to(tl.pointer_type(tl.int64))
    at = tl.arange(0, BLOCK)
    inside = at < tl.load(row + 2)
    tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)
