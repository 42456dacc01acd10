"""Settings: flags in both spellings, and errors that name the flag."""

from __future__ import annotations

import pytest

from milepost_engine.settings import from_command_line


def test_flags_may_have_dashes_or_underscores():
    settings = from_command_line(
        [
            "--model",
            "/models/tiny",
            "--max-running-requests",
            "7",
            "--context_length=99",
            "--dialect",
            "0.5.19",
        ]
    )
    assert settings.max_running_requests == 7
    assert settings.context_length == 99
    assert settings.dialect == "0.5.19"
    assert settings.name == "tiny"


def test_a_value_that_looks_like_a_flag_is_left_alone():
    settings = from_command_line(["--model", "/m", "--served-model-name=my-own--model"])
    assert settings.name == "my-own--model"


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--model", "/m", "--dialect", "0.4.0"], "dialect"),
        (["--model", "/m", "--max-runing-requests", "4"], "max_running_requests"),
        (["--model", "/m", "--port", "70000"], "port"),
        ([], "model"),
    ],
)
def test_errors_name_the_setting(capsys, flags, named):
    with pytest.raises(SystemExit) as caught:
        from_command_line(flags)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


def test_engines_of_one_fleet_share_a_seed_and_draw_differently():
    def sampling_seed(*flags: str) -> int:
        return from_command_line(["--model", "/m", *flags]).sampling_seed

    one = sampling_seed("--engine_id", "engine-0")
    assert one == sampling_seed("--engine_id", "engine-0")
    assert one != sampling_seed("--engine_id", "engine-1")
    assert one != sampling_seed("--engine_id", "engine-0", "--seed", "1")
    assert sampling_seed("--seed", "7") == 7
