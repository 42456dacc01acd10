"""Copies as rows of addresses; the kernel's part is done here by address, too, on the CPU."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from milepost_engine import copy_table

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "pick", "rows"),
    [
        ((64,), slice(None), 1),
        ((40_000,), slice(None), 3),
        ((6, 40), (slice(1, 4), slice(None)), 1),
        ((6, 40), (slice(None), slice(8, 24)), 6),
        ((4, 40_000), (slice(None), slice(4, 39_996)), 12),
    ],
    ids=["one row", "several blocks", "whole lines", "parts of lines", "blocks of parts"],
)
def test_rows_of_words_stand_for_a_copy(shape: tuple[int, ...], pick: Any, rows: int):
    """As the kernel does it, by address."""
    source, target = torch.randn(shape).to(torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)
    wanted = torch.zeros_like(target)
    wanted[pick] = source[pick]
    table = copy_table.rows_of(target[pick], source[pick])
    assert len(table) == rows
    for origin, to, words in table.tolist():
        assert 0 < words <= copy_table.BLOCK_WORDS
        ctypes.memmove(to, origin, 8 * words)
    assert torch.equal(target, wanted)


def test_rows_that_write_to_one_place_are_found():
    target, source = torch.zeros(4, 40_000), torch.zeros(4, 40_000)
    lines = [copy_table.rows_of(target[i], source[0]) for i in (2, 0, 1)]
    assert not copy_table._overlap(torch.cat(lines))
    late = copy_table.rows_of(target[1, 39_998:], source[1, 39_998:])
    assert copy_table._overlap(torch.cat([*lines, late]))


def test_rows_of_words_do_not_stand_for_a_cast_or_what_is_not_aligned():
    wide, narrow = torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.bfloat16)
    other = torch.zeros_like(narrow)
    assert len(copy_table.rows_of(narrow, wide)) == 0
    assert len(copy_table.rows_of(narrow[:, 1:5], other[:, 1:5])) == 0, "begins in the middle of a word"
    assert len(copy_table.rows_of(narrow[:, :6], other[:, :6])) == 0, "ends in the middle of one"
    assert len(copy_table.rows_of(narrow.T, other)) == 0
    assert len(copy_table.rows_of(narrow[:0], other[:0])) == 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Does what the kernel does, last row first; how many rows each run had."""
    runs: list[int] = []

    def run(rows: torch.Tensor, *, block: int) -> None:
        runs.append(len(rows))
        for origin, to, words in reversed(rows.tolist()):
            assert words <= block
            ctypes.memmove(to, origin, 8 * words)

    fake = SimpleNamespace(run=run)
    monkeypatch.setitem(sys.modules, "milepost_engine.copy_kernel", fake)
    monkeypatch.setattr("milepost_engine.copy_kernel", fake, raising=False)
    return runs


def test_a_table_copies_what_it_took_and_leaves_the_rest(kernel: list[int]):
    whole, part, cast, odd = torch.zeros(50, 40), torch.zeros(8, 8), torch.zeros(4, 4), torch.zeros(3)
    sources = torch.randn(50, 40), torch.randn(8, 16)[:, 8:], torch.randn(4, 4).double(), torch.randn(3)
    copies = list(zip((whole, part, cast, odd), sources, strict=True))
    table, left = copy_table.arrange(copies, CPU)
    assert table is not None
    assert [target is x for (target, _), x in zip(left, (cast, odd), strict=True)] == [True, True]
    assert [target is x for (target, _), x in zip(table.copies, (whole, part), strict=True)] == [True, True]
    table.run()
    assert torch.equal(whole, sources[0])
    assert torch.equal(part, sources[1])
    assert not cast.any()
    assert kernel == [1 + 8]


def test_there_is_no_table_of_nothing_nor_where_order_matters_nor_of_another_device():
    target, source = torch.zeros(16), torch.randn(16)
    for copies, device in (
        ([(target[:3], source[:3])], CPU),
        ([(target, source), (target[8:], source[8:])], CPU),
        ([(target, source)], torch.device("meta")),
    ):
        table, left = copy_table.arrange(copies, device)
        assert table is None
        assert left == copies
    assert copy_table.make([(target, source)]) == (None, [(target, source)])
    assert copy_table.make([]) == (None, [])
