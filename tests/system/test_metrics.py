"""The metrics of a whole stack that trains: they agree with the ledger, the log and one another, each is
documented, and the dashboard asks for nothing that is not there."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from milepost import RolloutClient, TrainerClient
from stack import ARITHMETIC, READY_S, ROOT, Stack, run, until

DASHBOARD = ROOT / "deploy" / "compose" / "observability" / "dashboards" / "milepost.json"
OURS = re.compile(r"\b(?:milepost_|train_|rollout_|perf_|sglang:|process_)[a-zA-Z0-9_:]+")
SERVICES = ("buffer", "router", "engine-0", "engine-1", "rollout", "trainer")
Page = dict[tuple[str, ...], float]


def expressions(node: Any) -> Iterator[str]:
    """Every expression in a dashboard, and the queries of its variables."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("expr", "definition") and isinstance(value, str):
                yield value
            yield from expressions(value)
    elif isinstance(node, list):
        for each in node:
            yield from expressions(each)


def names_in(text: str) -> set[str]:
    """Names of metrics in an expression: what stands outside of braces and of `by (...)`."""
    bare = re.sub(r"\{[^}]*\}|\bby\s*\([^)]*\)", "", text)
    return set(OURS.findall(bare))


def page(address: str) -> Page:
    """(name, label values in the order of their names ...) -> value."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as reply:
        text = reply.read().decode()
    return {
        (s.name, *(v for _, v in sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


async def pages(stack: Stack) -> dict[str, Page]:
    """What every service says now."""
    addresses = [stack.address(name, "metrics") for name in SERVICES]
    read = await asyncio.gather(*(asyncio.to_thread(page, address) for address in addresses))
    return dict(zip(SERVICES, read, strict=True))


def documented() -> set[str]:
    """Names in the table of docs/telemetry.md."""
    text = (ROOT / "docs" / "telemetry.md").read_text()
    return set(re.findall(r"^\| `([a-zA-Z0-9_:]+)`", text, flags=re.MULTILINE))


def base(name: str) -> str:
    """A sample's name without what a histogram adds."""
    return re.sub(r"_(bucket|sum|count)$", "", name)


def agree(said: dict[str, Page], stats: Any, last: dict[str, Any], run_id: str) -> None:
    """Numbers of a stack that stands still, against those who know."""
    buffer, rollout, trainer, router = (said[n] for n in ("buffer", "rollout", "trainer", "router"))
    for state in ("waiting", "rolling", "ready", "assigned", "trained"):
        assert buffer["milepost_ledger_prompts", run_id, state] == getattr(stats, state), state
    assert buffer["milepost_ledger_step", "committed", run_id] == stats.committed_step == last["step"]
    assert buffer["milepost_ledger_accepted_total", run_id] == stats.accepted
    assert buffer["milepost_ledger_credits", run_id] == stats.credits

    logged = {k: v for k, v in last.items() if "/" in k and v is not None}
    shown = {re.sub(r"[^a-zA-Z0-9:]+", "_", k): v for k, v in logged.items()}
    assert {name: trainer[name,] for name in shown} == pytest.approx(shown), "the gauges are the last line"
    assert trainer["milepost_trainer_step",] == stats.committed_step
    assert trainer["milepost_steps_trained_total", "no"] == stats.committed_step
    assert trainer["milepost_group_staleness_count",] == stats.trained
    assert trainer["milepost_step_weight_version",] == stats.weight_version

    assert router["milepost_engines", "serving"] == 2
    committed = router["milepost_transactions_total", "committed"]
    assert committed == trainer["milepost_publications_total", "published"]
    assert router["milepost_transaction_bytes_total",] == trainer["milepost_published_bytes_total",] > 0
    for phase in ("prepare", "pause", "transfer", "verify", "commit", "publish"):
        assert router["milepost_transaction_seconds_count", phase] >= committed

    sealed = rollout["milepost_groups_settled_total", "sealed"]
    kept = stats.trained + stats.assigned + stats.ready
    assert sealed == buffer["milepost_seals_total", "sealed"] == kept + stats.stale_requeues
    asks = sum(rollout["milepost_engine_asks_total", r] for r in ("answered", "cut_short"))
    assert asks == router["milepost_proxy_requests_total", "ok"] > 0
    given = sum(v for k, v in router.items() if k[0] == "milepost_engine_requests_total")
    ended = [v for e in SERVICES[2:4] for k, v in said[e].items() if k[0] == "sglang:num_requests_total"]
    # What was taken from an engine, by an evaluation's end for example, was given to it and not answered.
    assert asks <= given
    assert asks <= sum(ended)
    assert rollout["milepost_samples_in_flight",] == router["milepost_proxy_in_flight",] == 0
    assert rollout["milepost_gateway_paused",] == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_metrics_of_a_whole_stack(
    start_stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in os.environ if n.endswith("__METRICS_LISTEN")]:
        monkeypatch.delenv(name)
    run(sys.executable, ARITHMETIC / "make_data.py", "--out", tmp_path, "--train", "4000")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join((tmp_path / "train.jsonl").read_text().splitlines()[:4]) + "\n")
    stack = start_stack(
        "--feed",
        str(tmp_path / "train.jsonl"),
        name="metered",
        rollout__evaluate={"prompts": str(held_out), "every_steps": 2},
    )
    async with stack.buffer() as buffer:

        async def trained() -> bool:
            evaluated = stack.run_dir / "eval.jsonl"
            step = (await stack.stats(buffer)).committed_step
            return step >= 6 and evaluated.exists() and evaluated.stat().st_size > 0

        await until("six steps and an evaluation", trained, within_s=READY_S)
        async with (
            RolloutClient(stack.address("rollout")) as rollout,
            TrainerClient(stack.address("trainer")) as trainer,
        ):
            await rollout.pause()
            await trainer.pause_training()

            async def still() -> bool:
                status, at = await rollout.get_status(), await trainer.get_trainer_status()
                quiet = not status.groups_in_flight and not status.samples_in_flight
                published = (await stack.stats(buffer)).weight_label == at.step
                return quiet and at.phase == "paused" and published

            await until("everybody has stopped", still, within_s=READY_S)
            disagreed = ""

            async def all_agree() -> dict[str, Page] | None:
                """Evaluations and weights for an engine that lags may still be on their way."""
                nonlocal disagreed
                said, stats = await pages(stack), await stack.stats(buffer)
                last = json.loads((stack.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
                try:
                    agree(said, stats, last, stack.run_id)
                except AssertionError as error:
                    disagreed = str(error)
                    return None
                return said

            try:
                said = await until("the numbers agree", all_agree, within_s=READY_S)
            except pytest.fail.Exception:
                pytest.fail(f"the numbers do not agree: {disagreed}")

    exposed = {key[0] for one in said.values() for key in one}
    asked = {name for text in expressions(json.loads(DASHBOARD.read_text())) for name in names_in(text)}
    assert len(asked) > 50
    assert sorted(asked - exposed) == [], "the dashboard asks for what nobody exposes"
    ours = {base(n) for n in exposed if OURS.fullmatch(n) and not n.startswith("process_")}
    assert sorted(ours - {base(n) for n in documented()}) == [], "exposed and not in docs/telemetry.md"
    assert stack.stop() == 130


def test_the_documented_table_is_what_the_services_export() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "metrics_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_the_documents_tell_to_look_at_exists() -> None:
    text = (ROOT / "docs" / "telemetry.md").read_text()
    section = text.partition("\n## Metrics\n")[2].partition("<!-- metrics: begin")[0]
    told = names_in(" ".join(re.findall(r"`([^`]+)`", section)))
    known = documented()
    assert told
    assert sorted(n for n in told if base(n) not in known and n not in known) == []
