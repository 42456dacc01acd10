"""Ranks end with whoever started them: their launcher, and its parent where it is told to die with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stack import until

TRAINER = "[run]\nrun_id = 'r'\n[trainer]\nmodel_dir = '{model}'\nlisten = '127.0.0.1:0'\nnproc = 2\n"
PARENT = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"


def of(config: Path) -> set[int]:
    """Processes with this file on their command line."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.fsencode(config) in (entry / "cmdline").read_bytes().split(
                b"\0"
            ):
                found.add(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@pytest.mark.parametrize("victim", ["parent", "launcher"])
async def test_ranks_do_not_outlive_who_started_them(tmp_path: Path, tiny_model: Path, victim: str) -> None:
    """They wait for a buffer that is not there, as they may for ever."""
    config, log = tmp_path / "milepost.toml", tmp_path / "log"
    config.write_text(TRAINER.format(model=tiny_model))
    command = ["-m", "milepost_trainer", "serve", "--config", str(config), "--buffer", "127.0.0.1:9"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MILEPOST_DIE_WITH_PARENT": "1"}
    with log.open("wb") as output:
        parent = subprocess.Popen(  # noqa: ASYNC220 (it starts at once)
            [sys.executable, "-c", PARENT, *command],
            stdout=output,
            stderr=output,
            env=environment,
            cwd=tmp_path,
        )
    try:

        async def ranks_wait() -> bool:
            assert parent.poll() is None, log.read_text()
            return "the buffer does not answer" in log.read_text()

        await until("ranks wait for the buffer", ranks_wait, within_s=180)
        assert len(of(config)) >= 4, "the parent, the launcher, torchrun and a rank"
        os.kill(parent.pid if victim == "parent" else only_child(parent.pid), signal.SIGKILL)
        parent.wait(30)

        async def nobody() -> bool:
            return not of(config)

        await until("all have ended", nobody, within_s=60)
    finally:
        parent.kill()
        parent.wait(30)
        for pid in of(config):
            os.kill(pid, signal.SIGKILL)
