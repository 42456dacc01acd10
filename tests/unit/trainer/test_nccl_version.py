"""Which NCCL a trainer says that it has: the one in its memory, not the one that torch was built with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc makes the library of this test")

SOURCE = "int ncclGetVersion(int *version) { *version = 23007; return 0; }"
ASK = """
import ctypes, sys
if len(sys.argv) > 1:
    ctypes.CDLL(sys.argv[1])
from milepost_trainer.transports.nccl import loaded_nccl
print(loaded_nccl())
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library of NCCL's name that tells its release as NCCL does."""
    (tmp_path / "nccl.c").write_text(SOURCE)
    found = tmp_path / "nvidia-nccl.so"
    options = ("-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", "-o")
    command = ["gcc", *options, str(found), str(tmp_path / "nccl.c")]
    subprocess.run(command, check=True, timeout=60)
    return found


def said(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ASK, *arguments], capture_output=True, text=True, timeout=110, check=True
    )
    return done.stdout.strip()


def test_the_library_in_memory_says_its_release(library: Path) -> None:
    assert said(str(library)) == "2.30.7"


def test_a_library_that_is_not_loaded_is_not_loaded_to_be_asked() -> None:
    assert said() == ""
