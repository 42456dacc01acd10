"""`milepost up` over the real services: readiness, restarts, a clean end, no orphans, a whole small run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from milepost import BufferClient, RunConfig
from milepost.cli.options import DEFAULTS

from .conftest import DEADLINE_S, Start, alive, until

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
READY_S = 180.0

pytestmark = pytest.mark.timeout(600)


class Up:
    """One `milepost up`, and what it says of itself in up.json."""

    def __init__(self, process: asyncio.subprocess.Process, run_dir: Path) -> None:
        self.process, self.run_dir = process, run_dir

    def services(self) -> Mapping[str, Any]:
        path = self.run_dir / "up.json"
        return json.loads(path.read_text())["services"] if path.exists() else {}

    def all_ready(self) -> bool:
        assert self.process.returncode is None, self.said
        services = self.services()
        return bool(services) and all(s["state"] == "ready" for s in services.values())

    def is_again(self, name: str, *, starts: int) -> Callable[[], bool]:
        return lambda: self.services()[name]["state"] == "ready" and self.services()[name]["starts"] >= starts

    def family(self) -> list[psutil.Process]:
        """All its descendants, the embedded Redis among them."""
        return psutil.Process(self.process.pid).children(recursive=True)

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), DEADLINE_S * 2)

    @property
    def said(self) -> str:
        return (self.run_dir.parent / "up.out").read_text()


async def up(milepost: Start, folder: Path, *args: str) -> Up:
    """Starts it on free ports in a folder of its own."""
    run_dir = folder / "run"
    with (folder / "up.out").open("ab") as out:
        process = await milepost(
            "up", "--ports", "free", "--run_dir", str(run_dir), *args, cwd=folder, stdout=out, stderr=out
        )
    return Up(process, run_dir)


def config(folder: Path, text: str = "") -> str:
    path = folder / "milepost.toml"
    path.write_text(text)
    return str(path)


def tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer of ten digits, one token each."""
    made = Tokenizer(models.WordLevel({str(i): i for i in range(10)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    target = folder / "tokenizer"
    target.mkdir()
    made.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return target


SMALL = ("--no-trainer", "--engines", "0")


async def test_services_come_back_and_all_end_on_ctrl_c(milepost: Start, tmp_path: Path) -> None:
    config(tmp_path, f'[run]\nrun_id = "r"\n[rollout]\ntokenizer = "{tokenizer(tmp_path)}"\n')
    run = await up(milepost, tmp_path, *SMALL)
    await until(run.all_ready, deadline_s=READY_S)
    before = run.services()
    assert list(before) == ["buffer", "router", "rollout"]
    async with BufferClient(before["buffer"]["addresses"]["grpc"]) as client:
        await client.create_run("r", config=RunConfig(groups_per_step=2, samples_per_prompt=1))
    for name in ("buffer", "rollout"):
        os.kill(before[name]["pid"], signal.SIGKILL)
    for name in ("buffer", "rollout"):
        await until(run.is_again(name, starts=2), deadline_s=READY_S)
        assert run.services()[name]["addresses"] == before[name]["addresses"]
    async with BufferClient(before["buffer"]["addresses"]["grpc"]) as client:
        assert (await client.get_run("r")).run_id == "r"
    family = [p.pid for p in run.family()]
    assert len(family) >= 4  # the embedded Redis too
    run.process.send_signal(signal.SIGINT)
    assert await run.ended() == 130
    assert not any(map(alive, family))
    stopped = [line.split()[1] for line in run.said.splitlines() if " stopped " in line]
    assert stopped == ["rollout", "router", "buffer"]


async def test_nothing_outlives_a_supervisor_that_is_killed(milepost: Start, tmp_path: Path) -> None:
    config(tmp_path, f'[rollout]\ntokenizer = "{tokenizer(tmp_path)}"\n')
    run = await up(milepost, tmp_path, *SMALL)
    await until(run.all_ready, deadline_s=READY_S)
    family = [p.pid for p in run.family()]
    run.process.kill()
    await until(lambda: not any(map(alive, family)), what="every child ends")


async def test_a_run_folder_has_one_owner(milepost: Start, tmp_path: Path) -> None:
    first = await up(milepost, tmp_path, "--no-trainer", "--no-rollout", "--engines", "0")
    await until(first.all_ready, deadline_s=READY_S)
    second = await up(milepost, tmp_path, *SMALL)
    assert await second.ended() == 1
    assert "another `milepost up` owns it" in first.said
    assert first.all_ready()
    first.process.send_signal(signal.SIGTERM)
    assert await first.ended() == 0


@pytest.mark.parametrize(
    ("text", "args", "named"),
    [
        ("", (), "trainer.model_dir is missing"),
        ("[buffer]\nlistn = 1\n", SMALL, "buffer.listn = 1; did you mean listen"),
        ("[up]\nengins = 1\n", SMALL, "up.engins = 1; did you mean engines"),
        ("", ("--engins", "1"), "did you mean --engines"),
        ("", ("--config", "none.toml"), "none.toml"),
    ],
)
async def test_wrong_settings_start_nothing(
    milepost: Start, tmp_path: Path, text: str, args: tuple[str, ...], named: str
) -> None:
    config(tmp_path, text)
    run = await up(milepost, tmp_path, "--engines", "0", *args)
    assert await run.ended() == 2
    assert named in run.said
    assert not run.services()


async def test_a_service_that_cannot_start_ends_everything_with_its_last_words(
    milepost: Start, tmp_path: Path
) -> None:
    text = '[buffer]\nredis_url = "redis://127.0.0.1:1/0"\nredis_wait_s = 0\n[up]\ncrash_limit = 2\n'
    config(tmp_path, text)
    run = await up(milepost, tmp_path, *SMALL)
    assert await run.ended() == 1
    assert "redis://127.0.0.1:1" in run.said
    assert run.services()["buffer"]["starts"] == 2


CONFIG = """
[run]
run_id = "small"
groups_per_step = 4
samples_per_prompt = 2
max_staleness = 1
reward = "exact"
[run.sampling]
max_new_tokens = 4
[up]
engines = 1
feed = "train.jsonl"
[trainer]
model_dir = "model"
[trainer.checkpoint]
every = 1
[trainer.metrics]
tensorboard = false
"""


@pytest.mark.slow
async def test_a_whole_run(milepost: Start, start: Start, tmp_path: Path) -> None:
    """Feed, roll out, train, publish, audit, roll out with the trained model, all by the command alone."""
    making = await start(sys.executable, EXAMPLE / "make_model.py", "--out", tmp_path / "model")
    assert await asyncio.wait_for(making.wait(), READY_S) == 0
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"1{i}+2{i}=", "label": "0"}) + "\n" for i in range(10)))
    config(tmp_path, CONFIG)
    run = await up(milepost, tmp_path, "--stay")
    await until(lambda: run.services().get("trainer", {}).get("state") == "done", deadline_s=400)
    await until(lambda: run.services()["feed"]["exit_code"] == 0, what="the feeder has ended, too")
    where = ("--run", "small", "--run-dir", str(run.run_dir))
    frame = await milepost("watch", "--once", *where, env={"COLUMNS": "140"})
    shown = (await frame.communicate())[0].decode()
    assert frame.returncode == 0
    assert "of 10 accepted" in shown
    assert "engine-0" in shown
    listed = await milepost("engines", "--json", *where)
    engines = json.loads((await listed.communicate())[0])["engines"]
    assert [(e["engine_id"], e["state"], e["weight_label"]) for e in engines] == [("engine-0", "serving", 3)]
    audit = await milepost("ledger", "--audit", "--witness", run.run_dir, "--json", *where)
    report = json.loads((await audit.communicate())[0])
    assert audit.returncode == 0, report
    assert (report["accepted"], report["trained"] + sum(report["dropped"].values())) == (10, 10)
    out = tmp_path / "out.jsonl"
    rolled = await milepost("rollout", data, "--samples", "2", "--reward", "exact", "--out", out, *where)
    said = (await rolled.communicate())[1].decode()
    assert rolled.returncode == 0, said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((r["prompt_id"], r["index"]) for r in rows) == [
        (f"train/0/{i}", n) for i in range(10) for n in (0, 1)
    ]
    for row in rows:
        length = len(row["tokens"])
        assert len(row["logprobs"]) == len(row["loss_mask"]) == length
        assert sum(row["loss_mask"]) == length - row["prompt_length"] > 0
        assert row["reward"] in (0.0, 1.0)
        assert row["outcome"] in ("completed", "truncated")
    drained = await milepost("engines", "drain", "engine-0", *where)
    assert b"is drained" in (await drained.communicate())[0]
    run.process.send_signal(signal.SIGTERM)
    assert await run.ended() == 0


@pytest.mark.slow
async def test_rollouts_on_their_own(milepost: Start, start: Start, tmp_path: Path) -> None:
    making = await start(sys.executable, EXAMPLE / "make_model.py", "--out", tmp_path / "model")
    assert await asyncio.wait_for(making.wait(), READY_S) == 0
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "1+1=", "label": "2"}\nrubbish\n{"prompt": "2+2="}\n')
    alone = ("--rollout", "127.0.0.1:1", "--standalone", "--model", str(tmp_path / "model"))
    rolled = await milepost("rollout", data, *alone, "--max-new-tokens", "3", "--samples", "2")
    out, err = await asyncio.wait_for(rolled.communicate(), READY_S)
    assert rolled.returncode == 1  # a line was skipped
    assert b"line 2" in err
    rows = [json.loads(line) for line in out.splitlines()]
    assert sorted((r["prompt_id"], r["index"]) for r in rows) == [
        (f"prompts/0/{i}", n) for i in (0, 2) for n in (0, 1)
    ]
    assert all(r["reward"] is None for r in rows)


async def test_watching_nobody_says_who_is_away(milepost: Start, tmp_path: Path) -> None:
    nobody = [x for service in DEFAULTS for x in (f"--{service}", "127.0.0.1:1")]
    frame = await milepost("watch", "--once", *nobody)
    shown = (await frame.communicate())[0].decode()
    assert frame.returncode == 1
    for name in ("buffer", "router", "gateway", "trainer"):
        assert f"{name} is away" in shown


async def test_a_live_view_survives_everybody_and_ends_on_ctrl_c(milepost: Start, tmp_path: Path) -> None:
    nobody = [x for service in DEFAULTS for x in (f"--{service}", "127.0.0.1:1")]
    master, slave = os.openpty()
    try:
        view = await milepost("watch", *nobody, "--interval", "0.1", stdout=slave, env={"TERM": "xterm"})
        os.set_blocking(master, False)
        seen = bytearray()

        def shows() -> bool:
            with contextlib.suppress(BlockingIOError):
                seen.extend(os.read(master, 65536))
            return seen.count(b"does not answer") >= 8  # two frames at least

        def ended() -> bool:
            shows()  # a terminal that nobody reads is full soon, and the view would wait for it
            return view.returncode is not None

        await until(shows)
        view.send_signal(signal.SIGINT)
        await until(ended)
        assert view.returncode == 130
    finally:
        os.close(master)
        os.close(slave)
