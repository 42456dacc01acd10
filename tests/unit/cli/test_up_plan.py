"""What `milepost up` starts for a configuration, and the flags by which children find one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milepost.errors import InvalidArgument
from milepost_common.settings import load
from milepost_common.up.plan import Plan, find_config, make_plan
from milepost_common.up.settings import UpSettings

AT: dict[str, dict[str, str]] = {
    "buffer": {"grpc": "b:1"},
    "router": {"grpc": "r:2", "http": "r:3"},
    "engine-0": {"http": "127.0.0.1:40000"},
    "engine-1": {},
    "rollout": {},
    "trainer": {},
    "feed": {},
}
FILE = '[run]\nrun_id = "x"\n[trainer]\nmodel_dir = "the-model"\n'


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for model in ("the-model", "other", "m"):
        Path(model).mkdir()
        Path(model, "config.json").write_text("{}")
    Path("d.jsonl").write_text("")


def plan(text: str = FILE, *flags: str, environ: dict[str, str] | None = None) -> Plan:
    Path("m.toml").write_text(text)
    settings = load(UpSettings, ["--config", "m.toml", *flags], environ={})
    return make_plan(settings, config="m.toml", environ=environ or {})


def flags_of(made: Plan, name: str, at: dict[str, dict[str, str]] | None = None) -> dict[str, str]:
    """The flags of one child by name; the last one counts."""
    (spec,) = [s for s in made.specs if s.name == name]
    words = spec.command(at or AT)
    return {w: words[i + 1] for i, w in enumerate(words[:-1]) if w.startswith("--")}


def test_children_and_their_order() -> None:
    made = plan(FILE, "--engines", "2", "--feed", "d.jsonl")
    assert [s.name for s in made.specs] == [
        "buffer",
        "router",
        "engine-0",
        "engine-1",
        "rollout",
        "trainer",
        "feed",
    ]
    needs = {s.name: s.needs for s in made.specs}
    assert needs["buffer"] == ()
    assert needs["router"] == needs["feed"] == ("buffer",)
    assert needs["engine-1"] == ("router",)
    assert needs["rollout"] == needs["trainer"] == ("buffer", "router")
    ranks = {s.name: s.stop_rank for s in made.specs}
    assert (
        ranks["trainer"]
        == ranks["feed"]
        < ranks["rollout"]
        < ranks["engine-0"]
        < ranks["router"]
        < ranks["buffer"]
    )
    (trainer,) = (s for s in made.specs if s.ends_run)
    assert trainer.name == "trainer"
    assert trainer.final_codes == {0, 3, 4}, "3: another trainer took over, and a restart would fence it"
    assert trainer.ends_run == {0: 0, 4: 1}
    assert (made.run_id, made.run_dir) == ("x", Path("runs/x"))


def test_what_is_not_wanted_is_not_started() -> None:
    made = plan("", "--no-trainer", "--no-rollout", "--engines", "0")
    assert [s.name for s in made.specs] == ["buffer", "router"]
    assert made.run_id == "default"


def test_children_are_told_where_the_others_are() -> None:
    made = plan(FILE, "--feed", "d.jsonl")
    assert flags_of(made, "router")["--buffer"] == "b:1"
    assert flags_of(made, "engine-0")["--router"] == "r:2"
    rollout = flags_of(made, "rollout")
    assert (rollout["--buffer"], rollout["--router"], rollout["--router_http"]) == (
        "b:1",
        "r:2",
        "http://r:3",
    )
    trainer = flags_of(made, "trainer")
    assert (trainer["--buffer"], trainer["--router"], trainer["--run.run_id"]) == ("b:1", "r:2", "x")
    feed = flags_of(made, "feed")
    assert (feed["--buffer"], feed["--run"]) == ("b:1", "x")
    assert feed["--acknowledged"] == "runs/x/acknowledged.jsonl"


def test_metrics_take_the_configured_ports_free_ones_or_none() -> None:
    made = plan(FILE, "--engines", "2")
    assert "--metrics_listen" not in flags_of(made, "buffer")
    assert "--metrics_listen" not in flags_of(made, "engine-0")
    assert flags_of(made, "engine-1")["--metrics_listen"] == "127.0.0.1:9106"

    free = plan(FILE, "--engines", "2", "--ports", "free")
    at = AT | {"buffer": {"grpc": "b:1", "metrics": "127.0.0.1:4444"}}
    assert flags_of(free, "buffer", at)["--metrics_listen"] == "127.0.0.1:4444", "the same after a restart"
    for name in ("router", "engine-0", "engine-1", "rollout", "trainer"):
        assert flags_of(free, name)["--metrics_listen"] == "127.0.0.1:0", name

    off = plan(FILE, "--ports", "free", environ={"MILEPOST_ENGINE__METRICS_LISTEN": ""})
    assert "--metrics_listen" not in flags_of(off, "engine-0")
    assert "--metrics_listen" in flags_of(off, "router")


def test_what_nobody_set_lies_in_the_run_folder_and_uses_the_trainers_model() -> None:
    made = plan()
    assert flags_of(made, "buffer")["--data_dir"] == "runs/x/redis"
    assert flags_of(made, "trainer")["--checkpoint.dir"] == "runs/x/checkpoints"
    assert flags_of(made, "trainer")["--metrics.dir"] == "runs/x"
    assert flags_of(made, "engine-0")["--model"] == "the-model"
    assert flags_of(made, "rollout")["--tokenizer"] == "the-model"


def test_what_somebody_set_is_left_alone() -> None:
    text = FILE + '[trainer.checkpoint]\ndir = "c"\n[buffer]\ndata_dir = "d"\n'
    text += '[engine]\nmodel = "m"\n[rollout]\nrun_id = "y"\n'
    made = plan(text, environ={"MILEPOST_ROLLOUT__TOKENIZER": "t"})
    assert "--data_dir" not in flags_of(made, "buffer")
    assert "--checkpoint.dir" not in flags_of(made, "trainer")
    assert "--model" not in flags_of(made, "engine-0")
    assert "--tokenizer" not in flags_of(made, "rollout")
    assert "--run_id" not in flags_of(made, "rollout")


def test_configured_ports_are_left_to_the_services_and_engines_count_up() -> None:
    made = plan(FILE + "[engine]\nport = 31000\n", "--engines", "2")
    assert "--listen" not in flags_of(made, "buffer")
    none: dict[str, dict[str, str]] = {**AT, "engine-0": {}}
    assert flags_of(made, "engine-0", none)["--port"] == "31000"
    assert flags_of(made, "engine-1", none)["--port"] == "31001"


def test_free_ports_are_kept_on_a_restart() -> None:
    made = plan(FILE, "--ports", "free", "--engines", "2")
    fresh: dict[str, dict[str, str]] = {name: {} for name in AT}
    assert flags_of(made, "buffer", fresh)["--listen"] == "127.0.0.1:0"
    assert flags_of(made, "buffer")["--listen"] == "b:1"
    assert flags_of(made, "router")["--http_listen"] == "r:3"
    assert flags_of(made, "engine-0")["--port"] == "40000"
    assert flags_of(made, "engine-1")["--port"] == "0"


@pytest.mark.parametrize(
    ("text", "flags", "named"),
    [
        ("", (), "trainer.model_dir is missing"),
        ("", ("--no-trainer",), "engine.model is missing"),
        (FILE + "[rollout]\ntokeniser = 1\n", (), "did you mean tokenizer"),
        (FILE, ("--feed", "none.jsonl"), r"up\.feed = 'none.jsonl': no such file"),
        (FILE.replace("the-model", "gone"), (), r"trainer\.model_dir = 'gone': there is no such folder"),
        (FILE + '[engine]\nmodel = "."\n', (), r"engine\.model = '\.': it holds no config\.json"),
    ],
)
def test_every_service_is_checked_before_anything_starts(text: str, flags: Any, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        plan(text, *flags)


def test_the_configuration_file_is_found() -> None:
    assert find_config([]) == ""
    Path("milepost.toml").write_text("")
    assert find_config([]) == "milepost.toml"
    assert find_config(["--config", "a.toml"]) == find_config(["--config=a.toml"]) == "a.toml"


def test_all_children_get_the_table_telemetry() -> None:
    made = plan(
        FILE + '[telemetry]\notlp_endpoint = "http://c:4317"\ntrace_ratio = 0.5\n',
        "--feed",
        "d.jsonl",
        "--telemetry.log_format",
        "json",
    )
    wanted = {
        "MILEPOST_TELEMETRY__OTLP_ENDPOINT": "http://c:4317",
        "MILEPOST_TELEMETRY__TRACE_RATIO": "0.5",
        "MILEPOST_TELEMETRY__LOG_FORMAT": "json",
    }
    assert [dict(s.environ) for s in made.specs] == [wanted] * len(made.specs)
    assert [dict(s.environ) for s in plan().specs] == [{}] * len(plan().specs)


def test_sglang_is_left_to_its_launcher_and_given_the_time_that_it_takes_to_start() -> None:
    sglang = FILE + '[engine]\nbackend = "sglang"\nstart_timeout_s = 700.0\n[engine.sglang]\ntp_size = 1\n'
    (engine,) = (s for s in plan(sglang, "--engines", "1").specs if s.name == "engine-0")
    assert (engine.ready_timeout_s, engine.liveness_timeout_s) == (700.0, 0.0)
    (ours,) = (s for s in plan(FILE, "--engines", "1").specs if s.name == "engine-0")
    assert ours.liveness_timeout_s > 0


def test_engines_and_trainer_see_the_gpus_that_they_are_given() -> None:
    made = plan(f'{FILE}[up]\nengines = 2\nengine_gpus = ["1", "2,3"]\ntrainer_gpus = "0"\n')
    seen = {s.name: s.environ.get("CUDA_VISIBLE_DEVICES") for s in made.specs}
    assert (seen["trainer"], seen["engine-0"], seen["engine-1"]) == ("0", "1", "2,3")
    assert seen["router"] is seen["rollout"] is None
    assert all("CUDA_VISIBLE_DEVICES" not in s.environ for s in plan().specs)
    with pytest.raises(InvalidArgument, match=r"up\.engine_gpus .* 1 engines, up\.engines = 2"):
        plan(f'{FILE}[up]\nengines = 2\nengine_gpus = ["1"]\n')
