"""Checkpoint folders: whole or not at all, the newest valid one, and who may delete what."""

from __future__ import annotations

from pathlib import Path

import pytest

from milepost.types import DroppedGroup, DropReason, StepManifest
from milepost_trainer.checkpoint import (
    BadCheckpointError,
    CheckpointMeta,
    CheckpointName,
    CheckpointStore,
    manifest_since,
)

MANIFEST = (
    StepManifest(step=3, prompt_ids=("b", "a")),
    StepManifest(
        step=4,
        prompt_ids=("c", "d"),
        dropped=(DroppedGroup(prompt_id="d", reason=DropReason.INVALID),),
    ),
)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", run_id="run", keep=2)


def save(store: CheckpointStore, step: int, term: int, content: bytes = b"weights") -> Path:
    name = CheckpointName(step, term)
    state = store.begin(name)
    (state / "shard").write_bytes(content)
    return store.finish(CheckpointMeta(name=name, run_id=store.run_id, manifest=MANIFEST, world_size=2))


def test_what_is_saved_reads_back(store: CheckpointStore) -> None:
    save(store, 4, 7)
    meta, complaints = store.newest_valid()
    assert complaints == []
    assert meta == CheckpointMeta(name=CheckpointName(4, 7), run_id="run", manifest=MANIFEST, world_size=2)


def test_highest_step_then_highest_term_wins(store: CheckpointStore) -> None:
    for step, term in ((10, 1), (12, 1), (12, 2), (11, 3)):
        save(store, step, term)
    meta, _ = store.newest_valid()
    assert meta is not None
    assert meta.name == CheckpointName(12, 2)


@pytest.mark.parametrize("damage", ["truncate", "flip", "marker", "meta", "missing"])
def test_a_damaged_one_is_passed_over(store: CheckpointStore, damage: str) -> None:
    save(store, 1, 1)
    path = save(store, 2, 1)
    shard = path / "state" / "shard"
    match damage:
        case "truncate":
            shard.write_bytes(b"weigh")
        case "flip":
            shard.write_bytes(b"weightz")
        case "marker":
            (path / "COMPLETE").unlink()
        case "meta":
            (path / "meta.json").write_bytes((path / "meta.json").read_bytes() + b" ")
        case _:
            shard.unlink()
    with pytest.raises(BadCheckpointError):
        store.verify(CheckpointName(2, 1))
    meta, complaints = store.newest_valid()
    assert meta is not None
    assert meta.name.step == 1
    assert len(complaints) == 1


def test_a_partial_one_never_counts(store: CheckpointStore) -> None:
    (store.begin(CheckpointName(9, 1)) / "shard").write_bytes(b"half")
    assert store.newest_valid() == (None, [])


def test_another_runs_checkpoint_is_refused(store: CheckpointStore) -> None:
    save(store, 1, 1)
    other = CheckpointStore(store.directory, run_id="other", keep=2)
    with pytest.raises(BadCheckpointError, match="of run 'run'"):
        other.verify(CheckpointName(1, 1))


def test_pruning_keeps_the_newest_steps_and_spares_newer_terms(store: CheckpointStore) -> None:
    for step, term in ((0, 1), (10, 1), (15, 9), (20, 2), (30, 2)):
        save(store, step, term)
    store.begin(CheckpointName(40, 1))
    store.begin(CheckpointName(41, 9))
    store.prune(term=2)
    assert [(n.step, n.term) for n in store.names()] == [(30, 2), (20, 2), (15, 9)]
    assert [(n.step, n.term) for n in store.kept()] == [(30, 2), (20, 2)]
    assert [p.name for p in store.directory.glob(".partial*")] == [".partial.step_00000041.term_9"]


def test_the_manifest_reaches_back_to_the_oldest_kept_one() -> None:
    history = [StepManifest(step=s) for s in (5, 3, 4)]
    assert [e.step for e in manifest_since(history, oldest_kept=3)] == [4, 5]
