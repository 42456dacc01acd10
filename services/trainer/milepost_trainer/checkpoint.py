"""Checkpoint folders: written whole or not at all, read back before they are believed.

    <dir>/.partial.step_00000010.term_17...   being written
    <dir>/step_00000010.term_17.../          state/      written by the backend (torch.distributed.checkpoint)
                                             meta.json   step, term, manifest, size and SHA-256 of each file
                                             COMPLETE    SHA-256 of meta.json, written last

A folder counts when COMPLETE fits meta.json and meta.json fits the files. The newest is the one with the
highest step, then the highest term: after a restart the same steps are trained again by a newer term. A
trainer deletes folders of its own or older terms only, so one that was fenced cannot harm its successor. Rank
0 alone calls these functions, but for the backend's writing into the partial folder; whoever holds the newest
term owns the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.types import DroppedGroup, DropReason, StepManifest

FORMAT = 1
STATE = "state"
_NAME = re.compile(r"^step_(\d{8,})\.term_(\d+)$")
_PARTIAL = ".partial."


class BadCheckpointError(Exception):
    """A checkpoint folder is incomplete or damaged; it is passed over for the next older one."""


@dataclass(frozen=True, order=True)
class CheckpointName:
    """Which checkpoint a folder holds; ordered from oldest to newest.

    Attributes:
        step: newest step whose update the weights contain; 0 is the initial one.
        term: of the trainer that wrote it.
    """

    step: int
    term: int

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"step_{self.step:08d}.term_{self.term}"

    @classmethod
    def parse(cls, folder: str) -> CheckpointName | None:
        """The name that a folder carries, or None if it is no checkpoint."""
        match = _NAME.match(folder)
        return cls(int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says of itself.

    Attributes:
        name: step and term.
        run_id: the run it belongs to.
        manifest: groups of each step since the oldest checkpoint then kept.
        world_size: ranks that wrote it.
    """

    name: CheckpointName
    run_id: str
    manifest: tuple[StepManifest, ...] = ()
    world_size: int = 1


class CheckpointStore:
    """The checkpoints of one run in one directory."""

    def __init__(self, directory: Path, *, run_id: str, keep: int) -> None:
        """Open (and make) the directory.

        Args:
            directory: holds one folder a checkpoint.
            run_id: folders of another run are an error, not skipped.
            keep: how many newest ones ``prune`` leaves.
        """
        self.directory = directory
        self.run_id = run_id
        self.keep = keep
        directory.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[CheckpointName]:
        """Checkpoints that are there, newest first, unverified."""
        found = (CheckpointName.parse(item.name) for item in self.directory.iterdir())
        return sorted((name for name in found if name is not None), reverse=True)

    def path(self, name: CheckpointName) -> Path:
        """Folder of a checkpoint."""
        return self.directory / name.folder

    def begin(self, name: CheckpointName) -> Path:
        """Make an empty partial folder and return where the backend shall write its state."""
        partial = self._partial(name)
        shutil.rmtree(partial, ignore_errors=True)
        (partial / STATE).mkdir(parents=True)
        return partial / STATE

    def finish(self, meta: CheckpointMeta) -> Path:
        """Digest, flush and rename what ``begin`` opened; after this it survives power loss.

        Returns:
            The checkpoint's folder.
        """
        partial = self._partial(meta.name)
        files = {str(f.relative_to(partial)): _describe(f) for f in _files(partial / STATE)}
        content = json.dumps(_to_json(meta) | {"files": files}, indent=1).encode()
        _write(partial / "meta.json", content)
        _write(partial / "COMPLETE", hashlib.sha256(content).hexdigest().encode())
        for folder in (partial / STATE, partial):
            _flush(folder)
        final = self.path(meta.name)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(self.directory)
        return final

    def verify(self, name: CheckpointName) -> CheckpointMeta:
        """Read a checkpoint back, every byte of it.

        Raises:
            BadCheckpointError: it is incomplete, damaged, or of another run; the message says which file and
            why.
        """
        path = self.path(name)
        try:
            content = (path / "meta.json").read_bytes()
            marker = (path / "COMPLETE").read_text()
        except OSError as error:
            raise BadCheckpointError(f"{path}: {error.filename} cannot be read: {error.strerror}") from error
        if marker != hashlib.sha256(content).hexdigest():
            raise BadCheckpointError(f"{path}: COMPLETE does not fit meta.json")
        raw = json.loads(content)
        if raw["format"] != FORMAT or raw["run_id"] != self.run_id:
            raise BadCheckpointError(
                f"{path}: format {raw['format']} of run {raw['run_id']!r}, wanted {FORMAT} of {self.run_id!r}"
            )
        for relative, expected in raw["files"].items():
            file = path / relative
            if not file.is_file() or _describe(file, flush=False) != expected:
                raise BadCheckpointError(f"{path}: {relative} is not what was written")
        return _from_json(name, raw)

    def newest_valid(self) -> tuple[CheckpointMeta | None, list[str]]:
        """The newest checkpoint that reads back whole, and what was wrong with newer ones."""
        complaints: list[str] = []
        for name in self.names():
            try:
                return self.verify(name), complaints
            except BadCheckpointError as error:
                complaints.append(str(error))
        return None, complaints

    def kept(self) -> list[CheckpointName]:
        """What ``prune`` leaves, newest first: all folders of the newest ``keep`` steps."""
        names = self.names()
        steps = sorted({name.step for name in names}, reverse=True)[: self.keep]
        return [name for name in names if name.step in steps]

    def prune(self, *, term: int) -> None:
        """Delete what is older than ``kept``, and abandoned partial folders.

        Args:
            term: mine; folders of newer terms are not touched.
        """
        kept = self.kept()
        for name in self.names():
            if name not in kept and name.term <= term:
                _remove(self.path(name))
        for item in self.directory.glob(f"{_PARTIAL}*"):
            partial = CheckpointName.parse(item.name.removeprefix(_PARTIAL))
            if partial is not None and partial.term <= term:
                _remove(item)

    def _partial(self, name: CheckpointName) -> Path:
        return self.directory / f"{_PARTIAL}{name.folder}"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _describe(file: Path, *, flush: bool = True) -> dict[str, Any]:
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if flush:
            os.fsync(handle.fileno())
    return {"size_bytes": file.stat().st_size, "sha256": digest}


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Delete so that a half-deleted folder can never pass for a checkpoint."""
    (folder / "COMPLETE").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _to_json(meta: CheckpointMeta) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "run_id": meta.run_id,
        "step": meta.name.step,
        "term": meta.name.term,
        "world_size": meta.world_size,
        "manifest": [manifest_to_json(entry) for entry in meta.manifest],
    }


def _from_json(name: CheckpointName, raw: dict[str, Any]) -> CheckpointMeta:
    return CheckpointMeta(
        name=name,
        run_id=raw["run_id"],
        manifest=tuple(manifest_from_json(entry) for entry in raw["manifest"]),
        world_size=raw["world_size"],
    )


def manifest_to_json(entry: StepManifest) -> dict[str, Any]:
    """One step of a manifest as JSON; the step log has the same form."""
    dropped = {item.prompt_id: item.reason.name.lower() for item in entry.dropped}
    return {"step": entry.step, "prompt_ids": list(entry.prompt_ids), "dropped": dropped}


def manifest_from_json(raw: dict[str, Any]) -> StepManifest:
    """The inverse of ``manifest_to_json``."""
    return StepManifest(
        step=raw["step"],
        prompt_ids=tuple(raw["prompt_ids"]),
        dropped=tuple(
            DroppedGroup(prompt_id=prompt_id, reason=DropReason[reason.upper()])
            for prompt_id, reason in raw["dropped"].items()
        ),
    )


def manifest_since(history: Sequence[StepManifest], *, oldest_kept: int) -> tuple[StepManifest, ...]:
    """The steps after the oldest kept checkpoint, ascending."""
    return tuple(sorted((e for e in history if e.step > oldest_kept), key=lambda e: e.step))
