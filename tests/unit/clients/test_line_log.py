"""A file of JSON lines whose writer died in mid-line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milepost.errors import InvalidArgument
from milepost.linelog import LineLog, read_lines

GOOD = {"step": 1, "prompt_ids": ["a", "b"]}
CUT = {"step": 2, "prompt_ids": ["ü" * 5, 'quote " and \\ and \n'], "term": 1.5, "x": None}
NEXT = {"step": 3, "prompt_ids": []}


def rows(path: Path) -> list[object]:
    return [row for _, row in read_lines(path)]


@pytest.mark.parametrize("length", range(len(json.dumps(CUT)) + 1))
def test_a_line_cut_off_anywhere_costs_that_line_alone(tmp_path: Path, length: int) -> None:
    path = tmp_path / "steps.jsonl"
    whole = json.dumps(CUT)
    path.write_text(json.dumps(GOOD) + "\n" + whole[:length])
    with LineLog(path) as log:
        log.append(NEXT)
    expected = [GOOD, CUT, NEXT] if length == len(whole) else [GOOD, NEXT]
    assert rows(path) == expected
    with LineLog(path) as log:
        log.append(NEXT)
    assert rows(path) == [*expected, NEXT]


@pytest.mark.parametrize("before", ["", json.dumps(GOOD) + "\n"])
def test_a_tail_of_many_blocks_is_removed_with_a_notice(
    tmp_path: Path, before: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "acknowledged.jsonl"
    tail = '{"accepted": ["' + "x" * 300_000
    path.write_text(before + tail)
    with LineLog(path, synced=True) as log:
        log.append(NEXT)
    assert rows(path) == [json.loads(line) for line in before.splitlines()] + [NEXT]
    assert f"{path}: the last line was cut off when its writer died; its {len(tail)} bytes" in caplog.text


def test_a_whole_file_is_left_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "new" / "steps.jsonl"
    path.parent.mkdir()
    for _ in range(3):
        with LineLog(path) as log:
            log.append(GOOD)
    assert path.read_text() == 3 * (json.dumps(GOOD) + "\n")
    assert not caplog.records


def test_a_reader_passes_over_the_tail_and_over_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text('{"step": 1}\n{"step"')
    assert rows(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(InvalidArgument, match="line 2: JSONDecodeError"):
        rows(path)
