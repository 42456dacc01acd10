"""The command line: help everywhere, exit statuses, and messages that name the remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from milepost.cli import main as cli
from milepost.cli import services
from milepost.cli.options import DEFAULTS, in_words
from milepost.errors import Unavailable


def run(*args: str, cwd: Path | None = None, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *args] if code else [sys.executable, "-m", "milepost.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=cwd)


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_everywhere(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        cli.main([command, "--help"] if command else ["--help"])
    assert leave.value.code == 0
    said = capsys.readouterr().out
    assert "usage: milepost" in said
    assert "xit status" in said


@pytest.mark.parametrize(
    "args", [[], ["fead"], ["feed"], ["feed", "--bogus"], ["engines", "drain"], ["ledger", "--state", "lost"]]
)
def test_a_wrong_command_line_is_status_2(args: list[str]) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert "usage: milepost" in done.stderr + done.stdout


def test_a_file_that_is_not_there_is_named() -> None:
    done = run("feed", "none.jsonl", "--buffer", "127.0.0.1:1")
    assert done.returncode == 1
    assert "none.jsonl: No such file" in done.stderr


def test_nobody_there_says_what_to_look_at() -> None:
    done = run("ledger", "--buffer", "127.0.0.1:1")
    assert done.returncode == 1
    assert "127.0.0.1:1 does not answer; is it running" in done.stderr


def test_a_service_takes_over_the_whole_command_line() -> None:
    done = run("buffer", "serve", "--lisen", "x")
    assert done.returncode == 2
    assert "did you mean --listen" in done.stderr


def test_a_missing_extra_is_named() -> None:
    code = """
import sys
sys.modules["uvicorn"] = sys.modules["fastapi"] = sys.modules["redis"] = None
from milepost.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    done = run("buffer", "serve", code=code)
    assert done.returncode == 1
    assert "pip install 'milepost[buffer]'" in done.stderr


def test_the_command_needs_the_base_install_alone() -> None:
    code = """
import sys
before = set(sys.modules)
import importlib
from milepost.cli import main
for name in ("feed", "ledger", "engines", "rollout", "watch", "up", "config"):
    importlib.import_module(f"milepost.cli.{name}")
tops = {m.split(".")[0] for m in set(sys.modules) - before}
print(sorted(tops & {"pydantic", "rich", "aiohttp", "redis", "torch", "transformers", "fastapi", "uvloop"}))
"""
    assert run(code=code).stdout.strip() == "[]"


@pytest.mark.parametrize(("code", "status"), [(None, 0), (0, 0), (3, 3), ("words", 1)])
def test_exit_statuses_of_services(code: object, status: int) -> None:
    assert services._status(code) == status


def test_refused_connections_are_put_into_words() -> None:
    error = Unavailable("a:1: failed; last error: UNKNOWN: ipv4:1.2.3.4:5: Failed to connect to remote host")
    assert in_words(error).startswith("1.2.3.4:5 does not answer")
    assert in_words(error, where="x:1").startswith("x:1 does not answer")
    assert in_words(Unavailable("Redis is\naway")) == "Redis is away"


def test_addresses_come_from_the_flag_then_from_up_then_from_the_default(tmp_path: Path) -> None:
    import argparse

    from milepost.cli.options import address

    (tmp_path / "up.json").write_text(
        json.dumps({"pid": os.getpid(), "services": {"buffer": {"addresses": {"grpc": "h:9"}}}})
    )
    options = argparse.Namespace(run_id="r", run_dir=str(tmp_path), buffer="", router="")
    assert address(options, "buffer") == "h:9"
    assert address(options, "router") == DEFAULTS["router"]
    options.buffer = "mine:1"
    assert address(options, "buffer") == "mine:1"


def test_an_up_json_of_a_dead_supervisor_is_not_believed(tmp_path: Path) -> None:
    import argparse

    from milepost.cli.options import address

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(30)
    (tmp_path / "up.json").write_text(
        json.dumps({"pid": dead.pid, "services": {"buffer": {"addresses": {"grpc": "h:9"}}}})
    )
    options = argparse.Namespace(run_id="r", run_dir=str(tmp_path), buffer="")
    assert address(options, "buffer") == DEFAULTS["buffer"]
