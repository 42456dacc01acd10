"""What SGLang is launched with, and which GPUs its ranks use."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from milepost.errors import InvalidArgument
from milepost_engine import gpus
from milepost_engine.settings import EngineSettings, from_command_line
from milepost_engine.sglang_options import WEIGHT_HOOK, arguments, gpu_indices

OWN = ["--model-path", "/m", "--host", "127.0.0.1", "--port", "30001", "--served-model-name", "m"]

HOOK = ["--custom-weight-loader", WEIGHT_HOOK]


def _settings(sglang: dict[str, Any], **changes: Any) -> EngineSettings:
    return EngineSettings(backend="sglang", model=Path("/m"), sglang=sglang, **changes)


def _arguments(sglang: dict[str, Any], *, release: str = "0.5.21", **changes: Any) -> list[str]:
    return arguments(_settings(sglang, **changes), port=30001, release=release)


@pytest.mark.parametrize(
    "option, words",
    [
        ({"tp_size": 2}, ["--tp-size", "2"]),
        ({"tensor-parallel-size": "2"}, ["--tp-size", "2"]),
        ({"enable_memory_saver": True}, ["--enable-memory-saver"]),
        ({"enable_memory_saver": False}, []),
        ({"mem_fraction_static": 0.4}, ["--mem-fraction-static", "0.4"]),
        ({"cuda_graph_bs": [1, 2, 4]}, ["--cuda-graph-bs", "1", "2", "4"]),
        ({"json_model_override_args": {"a": 1}}, ["--json-model-override-args", '{"a": 1}']),
    ],
)
def test_options_are_passed_through_as_flags(option, words):
    assert _arguments(option) == OWN + words + HOOK


def test_our_loader_of_weights_stands_beside_theirs():
    ours = ["--custom-weight-loader", "my.loader", HOOK[-1]]
    assert _arguments({"custom_weight_loader": ["my.loader"]}) == OWN + ours
    assert _arguments({"custom-weight-loader": "my.loader"}) == OWN + ours
    module, _, function = HOOK[-1].rpartition(".")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    "release, given, disabled",
    [
        ("0.5.17", {}, True),
        ("0.5.20.post1", {}, True),
        ("0.5.20", {"disable_radix_cache": False}, False),
        ("0.5.21", {}, False),
        ("0.6.0", {}, False),
    ],
)
def test_prefixes_are_not_cached_where_an_update_under_load_cannot_flush_them(release, given, disabled):
    assert ("--disable-radix-cache" in _arguments(given, release=release)) is disabled


@pytest.mark.parametrize(
    "option, remedy",
    [
        ({"model_path": "/x"}, "engine.model"),
        ({"port": 1}, "engine.port"),
        ({"admin-api-key": "k"}, "engine.admin_api_key"),
        ({"weight_version": "7"}, "leave it out"),
    ],
)
def test_what_is_ours_to_give_is_refused_by_name(option, remedy):
    with pytest.raises(InvalidArgument, match=remedy):
        _arguments(option)


def test_keys_and_names_are_those_of_the_engine():
    words = _arguments({}, admin_api_key="s3cret", served_model_name="tiny")
    assert words[words.index("--admin-api-key") + 1] == "s3cret"
    assert words[words.index("--served-model-name") + 1] == "tiny"


def test_settings_of_the_cpu_engine_are_refused_beside_sglang(capsys):
    with pytest.raises(SystemExit):
        from_command_line(
            ["--backend", "sglang", "--model", "/m", "--dtype", "float32", "--admin-api-key", "k"]
        )
    said = capsys.readouterr().err
    assert "engine.dtype = 'float32'" in said
    assert "[engine.sglang]" in said


def test_a_file_gives_sglang_a_table_of_its_own(tmp_path):
    file = tmp_path / "milepost.toml"
    file.write_text(
        '[engine]\nbackend = "sglang"\nmodel = "/m"\n[engine.sglang]\ntp_size = 4\nbase_gpu_id = 2\n'
    )
    settings = from_command_line(["--config", str(file)])
    assert settings.sglang == {"tp_size": 4, "base_gpu_id": 2}
    assert gpu_indices(settings) == [2, 3, 4, 5]


GPUS = ["GPU-aa1", "GPU-bb2", "GPU-cc3"]


@pytest.mark.parametrize(
    "visible, indices, expected",
    [
        (None, [0, 2], ("GPU-aa1", "GPU-cc3")),
        ("2,0", [0, 1], ("GPU-cc3", "GPU-aa1")),
        ("GPU-bb", [0], ("GPU-bb2",)),
        ("1", [0, 1], ("GPU-bb2",)),
        ("", [0], ()),
        ("7", [0], ()),
        (None, [3], ()),
    ],
)
def test_ranks_are_named_by_the_gpus_that_are_visible(visible, indices, expected):
    assert gpus.among(GPUS, visible, indices) == expected
