"""A process that outlives its parent would hold its port; a suspended one does not even hear SIGTERM."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

DEADLINE_S = 20.0
CHILD = """
import sys
from milepost_common.process import run
async def main(stop):
    print("up", flush=True)
    await stop.wait()
    return 0
sys.exit(run("child", main))
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def parent(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """A parent, and its child that runs `process.run` under the setting of the test."""
    environ = {**os.environ, "MILEPOST_DIE_WITH_PARENT": request.param}
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environ)
    try:
        assert process.stdout
        assert select.select([process.stdout], [], [], DEADLINE_S)[0]
        child = psutil.Process(int(process.stdout.readline()))
        yield process, child
        if child.is_running():
            child.kill()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("parent", ["1", "kill"], indirect=True)
def test_a_child_ends_with_its_parent(parent) -> None:
    process, child = parent
    process.kill()
    process.wait()
    child.wait(DEADLINE_S)


@pytest.mark.parametrize("parent", ["kill"], indirect=True)
def test_a_suspended_child_ends_with_its_parent_by_kill(parent) -> None:
    process, child = parent
    os.kill(child.pid, signal.SIGSTOP)
    process.kill()
    process.wait()
    child.wait(DEADLINE_S)
