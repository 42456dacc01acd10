"""Where a setting's value comes from, and what a wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from milepost.errors import InvalidArgument
from milepost_common.settings import ServiceSettings, Table, TelemetrySettings, load


class Optimizer(Table):
    """Nested table."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


class RunTable(Table):
    """A table of its own in the file."""

    groups_per_step: int = 3


class Example(ServiceSettings, table="trainer", tables=("run",)):
    """Some service's settings."""

    listen: str = "a:1"
    optimizer: Optimizer = Optimizer()
    run: RunTable = RunTable()
    engines: tuple[str, ...] = ()
    tensorboard: bool = False


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "milepost.toml"
    path.write_text(text)
    return str(path)


def test_later_sources_win(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[trainer]\nlisten = "b:2"\n[trainer.optimizer]\nlr = 0.5\nbetas = [0.1, 0.2]\n'
        "[run]\ngroups_per_step = 7\n[engine]\nanything = 1\n",
    )
    environ = {"MILEPOST_TRAINER__OPTIMIZER__LR": "0.7", "MILEPOST_RUN__GROUPS_PER_STEP": "9", "OTHER": "x"}
    got = load(Example, ["--config", path, "--run.groups_per_step", "4", "--engines", "x,y"], environ=environ)
    assert got == Example(
        listen="b:2",
        optimizer=Optimizer(lr=0.7, betas=(0.1, 0.2)),
        run=RunTable(groups_per_step=4),
        engines=("x", "y"),
    )


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(Example, [], environ={}).listen = "c:3"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "argv", "environ", "expected"),
    [
        ('[trainer]\nlistn = "b:2"\n', [], {}, r"trainer\.listn = 'b:2'; did you mean listen"),
        ("[trainer.optimizer]\nlrr = 1\n", [], {}, r"trainer\.optimizer\.lrr = 1; did you mean lr"),
        ("[trianer]\n", [], {}, r"unknown table \[trianer\]; did you mean trainer"),
        ("[trainer\n", [], {}, "not TOML"),
        ("", ["--lisen", "x"], {}, "did you mean --listen"),
        ("", ["--optimizer.lr", "abc"], {}, r"trainer\.optimizer\.lr = 'abc'.*valid number"),
        ("", [], {"MILEPOST_TRAINER__LISTN": "x"}, "MILEPOST_TRAINER__LISTN.*did you mean listen"),
        ("", [], {"MILEPOST_TRAINER__OPTIMIZER__LRR": "1"}, "did you mean lr"),
        (
            "",
            [],
            {"MILEPOST_TRIANER__LISTEN": "x"},
            "MILEPOST_TRIANER__LISTEN.*no table trianer; did you mean trainer",
        ),
    ],
)
def test_wrong_settings_name_key_value_and_remedy(
    tmp_path: Path, text: str, argv: list[str], environ: dict[str, str], expected: str
) -> None:
    with pytest.raises(InvalidArgument, match=expected):
        load(Example, ["--config", write(tmp_path, text), *argv], environ=environ)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"--config /nowhere\.toml"):
        load(Example, ["--config", "/nowhere.toml"], environ={})


def test_every_service_reads_the_table_telemetry(tmp_path: Path) -> None:
    path = write(tmp_path, '[telemetry]\nlog_format = "json"\ntrace_ratio = 0.5\n')
    environ = {"MILEPOST_TELEMETRY__TRACE_RATIO": "0.25"}
    got = load(
        Example, ["--config", path, "--telemetry.otlp_endpoint", "http://collector:4317"], environ=environ
    )
    assert got.telemetry == TelemetrySettings(
        otlp_endpoint="http://collector:4317", trace_ratio=0.25, log_format="json"
    )
    with pytest.raises(InvalidArgument, match=r"telemetry\.otlp_endpoint = 'collector:4317'"):
        load(Example, ["--telemetry.otlp_endpoint", "collector:4317"], environ={})
    with pytest.raises(InvalidArgument, match=r"telemetry\.log_fromat = 'json'; did you mean log_format"):
        load(Example, ["--config", write(tmp_path, '[telemetry]\nlog_fromat = "json"\n')], environ={})
