"""Witnesses as checkpoints, step logs and feeders leave them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from milepost.cli.ledger import parts_of
from milepost.cli.witness import read_witnesses
from milepost.errors import InvalidArgument
from milepost.types import DroppedGroup, DropReason, StepManifest, Witness


def write(path: Path, *rows: object, tail: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    return path


def step(number: int, *ids: str, **dropped: str) -> dict[str, object]:
    return {"step": number, "prompt_ids": list(ids), "dropped": dropped, "term": 5}


def test_a_checkpoint_says_its_manifest(tmp_path: Path) -> None:
    meta = {"run_id": "r", "step": 7, "manifest": [step(6, "a", "b"), step(7, "c", "d", c="poison")]}
    path = write(tmp_path / "step_00000007.term_5" / "meta.json", meta)
    expected = Witness(
        name="checkpoint 7",
        steps=(
            StepManifest(step=6, prompt_ids=("a", "b")),
            StepManifest(
                step=7,
                prompt_ids=("c", "d"),
                dropped=(DroppedGroup(prompt_id="c", reason=DropReason.POISON),),
            ),
        ),
    )
    assert read_witnesses([path], run_id="r") == [expected]


def test_of_a_step_that_was_trained_again_the_last_line_stands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(
        tmp_path / "steps.jsonl", step(1, "a"), step(2, "b"), step(2, "c"), step(3, "d"), tail='{"step": 4'
    )
    (found,) = read_witnesses([path], run_id="r")
    assert [(s.step, s.prompt_ids) for s in found.steps] == [(1, ("a",)), (2, ("c",)), (3, ("d",))]
    assert "steps.jsonl: line 5 was cut off (10 bytes); passed over" in caplog.text


def test_steps_behind_the_one_that_a_newer_term_began_with_are_forgotten(tmp_path: Path) -> None:
    """They were rewound; a gap that was closed may have left fewer of them."""
    log = tmp_path / "steps.jsonl"
    rows = [(1, 10, "a"), (2, 10, "b"), (3, 10, "c"), (4, 10, "d"), (2, 11, "c"), (3, 11, "d")]
    lines = [{"step": step, "term": term, "prompt_ids": [name]} for step, term, name in rows]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (witness,) = read_witnesses([log], run_id="run")
    assert [(s.step, s.prompt_ids) for s in witness.steps] == [(1, ("a",)), (2, ("c",)), (3, ("d",))]


@pytest.mark.parametrize("name", ["acknowledged.jsonl", "ids.txt"])
def test_acknowledged_ids_come_in_order(tmp_path: Path, name: str) -> None:
    rows = [{"run_id": "r", "accepted": ["a", "b"]}, {"run_id": "r", "accepted": ["c"]}]
    (found,) = read_witnesses([write(tmp_path / name, *rows)], run_id="r")
    assert found == Witness(name=name, accepted_prompt_ids=("a", "b", "c"))


def test_a_folder_stands_for_all_witnesses_in_it(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints" / "step_00000001.term_5" / "meta.json", {"step": 1, "manifest": []})
    write(
        tmp_path / "checkpoints" / ".partial.step_00000002.term_5" / "meta.json", {"step": 2, "manifest": []}
    )
    write(tmp_path / "steps.jsonl", step(1, "a"))
    write(tmp_path / "acknowledged.jsonl", {"accepted": ["a"]})
    write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 0.5})
    names = sorted(w.name for w in read_witnesses([tmp_path], run_id="r"))
    assert names == ["acknowledged.jsonl", "checkpoint 1", "steps.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"run_id": "other", "accepted": []}\n', "of run 'other'"),
        ('{"step": 1}\n', "neither"),
        ("rubbish\n", "line 1: JSONDecodeError"),
        ('{"step": 1, "pro{"step": 2, "prompt_ids": []}\n', "line 1: JSONDecodeError"),
        ("[1]\n", "AttributeError"),
        ('{"step": 1, "prompt_ids": ["a"], "dropped": {"a": "boredom"}}\n', "BOREDOM"),
    ],
)
def test_what_is_no_witness_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidArgument, match=message) as caught:
        read_witnesses([path], run_id="r")
    assert str(path) in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no checkpoint"):
        read_witnesses([tmp_path], run_id="r")


def test_large_witnesses_travel_in_parts_and_lose_nothing() -> None:
    ids = tuple(f"prompt-{i}" for i in range(1000))
    steps = tuple(StepManifest(step=i + 1, prompt_ids=ids[10 * i : 10 * i + 10]) for i in range(100))
    parts = parts_of(
        [Witness(name="a", accepted_prompt_ids=ids), Witness(name="b", steps=steps)], most_bytes=2000
    )
    assert len(parts) > 10
    assert sorted(i for p in parts for w in p for i in w.accepted_prompt_ids) == sorted(ids)
    assert sorted(s.step for p in parts for w in p for s in w.steps) == list(range(1, 101))
    assert parts_of([]) == [[]]


def test_what_goes_while_a_folder_is_searched_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer renames its export, and removes its oldest checkpoint, under the audit's eyes."""
    write(tmp_path / "trainer" / "steps.jsonl", step(1, "a"))
    (tmp_path / "trainer" / "export").mkdir()
    removed = tmp_path / "trainer" / "step_00000001.term_5"
    removed.mkdir()
    (removed / "meta.json").symlink_to("gone")
    scandir = os.scandir

    def renamed_before(folder: str | Path) -> Any:
        if Path(folder).name == "export":
            Path(folder).rmdir()
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", renamed_before)
    (found,) = read_witnesses([tmp_path], run_id="r")
    assert found.name == "steps.jsonl"
    assert not (tmp_path / "trainer" / "export").exists()


def test_folders_that_are_being_written_are_no_witnesses(tmp_path: Path) -> None:
    write(tmp_path / "steps.jsonl", step(1, "a"))
    write(tmp_path / ".partial.step_00000002.term_5" / "meta.json", {"half": "of it"})
    assert [w.name for w in read_witnesses([tmp_path], run_id="r")] == ["steps.jsonl"]


def test_a_folder_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "steps.jsonl", step(1, "a"))

    def refused(folder: str | Path) -> Any:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError):
        read_witnesses([tmp_path], run_id="r")
