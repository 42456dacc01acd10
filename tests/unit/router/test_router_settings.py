"""Settings of the router and the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from milepost.errors import InvalidArgument
from milepost_common.settings import load
from milepost_router.settings import EngineSettings, RouterSettings


def test_engines_come_as_urls_or_tables(tmp_path: Path):
    config = tmp_path / "m.toml"
    config.write_text('[router]\nengines = ["http://a:1", {url = "http://b:2", id = "b", run_id = "r"}]\n')
    read = load(RouterSettings, ["--config", str(config)], environ={})
    assert read.engines == ("http://a:1", EngineSettings(url="http://b:2", id="b", run_id="r"))


@pytest.mark.parametrize("source", ["flag", "environment"])
def test_engines_come_separated_by_commas(source):
    urls = "http://a:1,http://b:2"
    argv = ["--engines", urls] if source == "flag" else []
    environ = {} if source == "flag" else {"MILEPOST_ROUTER__ENGINES": urls}
    assert load(RouterSettings, argv, environ=environ).engines == ("http://a:1", "http://b:2")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("request_retrys = 1", "did you mean request_retries"),
        ("probe_interval_s = 0", "router.probe_interval_s = 0"),
        ('policy = "fastest"', "router.policy = 'fastest'"),
        ("[[router.engines]]\nurls = 'x'", "urls"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, line: str, says: str):
    config = tmp_path / "m.toml"
    config.write_text(f"[router]\n{line}\n")
    with pytest.raises(InvalidArgument, match=says):
        load(RouterSettings, ["--config", str(config)], environ={})


def test_the_service_imports_no_torch():
    code = "import sys, milepost_router.__main__ as m; sys.exit(bool({'torch', 'redis'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("flag", "says"), [("--listen", "listen = 127.0.0.1:"), ("--http_listen", "http_listen = 127.0.0.1:")]
)
def test_a_port_that_is_taken_is_named(flag: str, says: str):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        other = "--http_listen" if flag == "--listen" else "--listen"
        command = [sys.executable, "-m", "milepost_router", "serve", "--buffer", "", flag, address]
        done = subprocess.run(
            [*command, other, "127.0.0.1:0"], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert says in done.stderr
    assert "is the port taken?" in done.stderr
