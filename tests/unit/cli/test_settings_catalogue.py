"""The catalogue of settings: what is documented is what is read, and origins are told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from milepost.errors import InvalidArgument
from milepost_common import config_command
from milepost_common.catalogue import MODULES, as_toml, describe, effective, given_keys, settings_class
from milepost_common.settings import ServiceSettings, Table


class Inner(Table):
    """A nested table."""

    rate: float = 0.5
    """How fast."""


class Example(ServiceSettings, table="trainer", tables=("run",)):
    """Some service."""

    listen: str = "a:1"
    """Where."""
    inner: Inner = Inner()
    names: tuple[str, ...] = ("x",)
    must: int
    run: Inner = Inner()


def test_settings_are_described_with_their_names_everywhere() -> None:
    found = {s.key: s for s in describe(Example)}
    assert [key for key in found if not key.startswith("telemetry.")] == [
        "trainer.listen",
        "trainer.inner.rate",
        "trainer.names",
        "trainer.must",
        "run.rate",
    ]
    rate = found["trainer.inner.rate"]
    assert (rate.environment, rate.flag) == ("MILEPOST_TRAINER__INNER__RATE", "--inner.rate")
    assert (rate.type, rate.default, rate.description) == ("number", "0.5", "How fast.")
    assert (found["run.rate"].environment, found["run.rate"].flag) == ("MILEPOST_RUN__RATE", "--run.rate")
    assert found["telemetry.log_format"].environment == "MILEPOST_TELEMETRY__LOG_FORMAT"
    assert found["trainer.must"].default == "required"
    assert (found["trainer.names"].type, found["trainer.names"].default) == ("list of string", '["x"]')


def test_the_strongest_source_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text('[trainer]\nlisten = "b:2"\nmust = 1\n[trainer.inner]\nrate = 1.5\n')
    argv = ["--config", str(path), "--must", "3"]
    environ = {"MILEPOST_TRAINER__INNER__RATE": "2.5"}
    found = {e.key: (e.value, e.origin) for e in effective(Example, argv, environ=environ)}
    assert found["trainer.listen"] == ("b:2", "file")
    assert found["trainer.inner.rate"] == ("2.5", "environment")
    assert found["trainer.must"] == ("3", "flag")
    assert found["run.rate"] == ("0.5", "default")
    assert given_keys(Example, argv, environ=environ) == {"listen", "inner.rate", "must"}


@pytest.mark.parametrize("service", MODULES)
def test_every_setting_of_every_service_says_what_it_means(service: str) -> None:
    found = list(describe(settings_class(service)))
    assert found
    assert [s.key for s in found if not s.description] == []
    assert len({s.key for s in found}) == len(found)


def test_an_unknown_service_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InvalidArgument, match="did you mean router"):
        settings_class("ruter")


def test_values_are_written_as_toml() -> None:
    assert as_toml({"a": [1, 2.5, True], "b": 'say "hi"'}) == '{a = [1, 2.5, true], b = "say \\"hi\\""}'


def test_settings_need_neither_torch_nor_redis() -> None:
    code = """
import sys
from milepost_common.catalogue import MODULES, settings_class
for service in MODULES:
    settings_class(service)
print([m for m in ("torch", "redis", "transformers") if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_check_names_what_is_wrong_in_any_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.toml"
    path.write_text('[run]\ngroups_per_stp = 3\n[trainer]\nmodel_dir = "m"\n[buffer]\nlisten = 5\n')
    assert config_command.main(["--check", str(path)]) == 1
    said = capsys.readouterr().err
    assert "run.groups_per_stp = 3; did you mean groups_per_step" in said
    assert "buffer.listen = 5" in said
    path.write_text('[run]\ngroups_per_step = 3\n[trainer]\nmodel_dir = "m"\n')
    assert config_command.main(["--check", str(path)]) == 0
    assert "right (run, trainer)" in capsys.readouterr().out
    assert config_command.main(["--check", str(tmp_path / "none.toml")]) == 1


def test_secrets_are_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.toml"
    path.write_text('[router]\nadmin_api_key = "hunter2"\n')
    assert config_command.main(["router", "--config", str(path), "--json"]) == 0
    shown = {r["key"]: r for r in json.loads(capsys.readouterr().out)["router"]}
    assert shown["router.admin_api_key"]["value"] == "********"
    assert config_command.main(["router", "--config", str(path)]) == 0
    assert "hunter2" not in capsys.readouterr().out
