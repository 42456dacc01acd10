"""One prompt, one trace: a loop of real processes tells a collector what it did, and its logs say it too.

One run serves most tests: four groups a step, three steps, fed by the feeder, and one prompt that fits no
engine. A second run has a collector's address at which nobody listens.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from collector import Collector, Told, collecting
from stack import ARITHMETIC, Stack, run

STEPS, GROUPS, SAMPLES = 3, 4, 2
LONG = "too/long"
RUN_S = 240.0
POLLS = re.compile(r"/(LeasePrompts|LeaseStep|Renew|Watch|Heartbeat|List|Get|Fetch|OpenSource|Put)")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@dataclass(frozen=True)
class Done:
    """A run that has ended."""

    stack: Stack
    collector: Collector

    def log_lines(self, name: str) -> list[dict[str, Any]]:
        """JSON lines of a service's log, all of which must be JSON but what it says on standard output."""
        lines = (self.stack.run_dir / "logs" / f"{name}.log").read_text().splitlines()
        return [json.loads(line) for line in lines if not re.match(r"milepost|engine ready|fed ", line)]


def write_prompts(folder: Path) -> Path:
    """The prompts of the run, and one that is longer than the context."""
    run(sys.executable, ARITHMETIC / "make_data.py", "--out", folder, "--train", str(STEPS * GROUPS))
    path = folder / "train.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"prompt_id": LONG, "prompt": "1" * 4096, "label": "1"}) + "\n")
    return path


def to_its_end(folder: Path, model: Path, **telemetry: Any) -> Stack:
    """Runs a whole loop until it has finished by itself."""
    folder.mkdir(exist_ok=True)
    stack = Stack.launch(
        folder / "traced",
        model,
        "--feed",
        str(write_prompts(folder)),
        run={"lease_ttl_s": 120.0},  # a gateway that stands still for a moment makes no second attempt
        up={"engines": 1},
        telemetry=telemetry,
    )
    try:
        code = stack.process.wait(RUN_S)
    finally:
        if stack.process.poll() is None:
            stack.stop()
    assert code == 0, stack.logs()
    return stack


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """The run that all look at."""
    with collecting() as collector:
        folder = tmp_path_factory.mktemp("traces")
        stack = to_its_end(folder, model, otlp_endpoint=collector.endpoint, log_format="json")
        yield Done(stack, collector)


def one(spans: list[Told], name: str) -> Told:
    """The one span of that name."""
    found = [s for s in spans if s.name == name]
    assert len(found) == 1, (name, [s.name for s in spans])
    return found[0]


def children(spans: list[Told], parent: Told) -> Counter[str]:
    """Names of a span's children."""
    return Counter(s.name for s in spans if s.parent_id == parent.span_id)


def trained(done: Done) -> dict[str, int]:
    """prompt -> step, as the trainer's step log has it."""
    rows = (json.loads(line) for line in (done.stack.run_dir / "steps.jsonl").read_text().splitlines())
    return {prompt_id: row["step"] for row in rows for prompt_id in row["prompt_ids"]}


def test_one_trace_spans_client_buffer_gateway_router_engine_reward_and_step(done: Done) -> None:
    steps = trained(done)
    assert len(steps) == STEPS * GROUPS
    for prompt_id, step in steps.items():
        (root,) = [s for s in done.collector.named("feed.put") if s.attributes["prompt_id"] == prompt_id]
        spans = done.collector.of_trace(root.trace_id)
        assert root.parent_id == ""
        assert children(spans, root) == {"buffer.put": 1, "buffer.lease": 1, "gateway.rollout": 1}
        rollout = one(spans, "gateway.rollout")
        assert children(spans, rollout) == {
            "gateway.generate": SAMPLES,
            "gateway.reward": 1,
            "buffer.seal": 1,
            "trainer.train": 1,
        }
        for sample in (s for s in spans if s.name == "gateway.generate"):
            assert children(spans, sample) == {"router.proxy": 1}
            (proxy,) = [s for s in spans if s.parent_id == sample.span_id]
            assert children(spans, proxy) == {"engine.generate": 1}
            (engine,) = [s for s in spans if s.parent_id == proxy.span_id]
            assert children(spans, engine) == {"engine.queue": 1, "engine.decode": 1}
            assert proxy.attributes["engine_id"] == engine.attributes["engine_id"] == "engine-0"
            assert engine.attributes["version"] == sample.attributes["version"]
            assert 1 <= proxy.attributes["version"] <= engine.attributes["version"]
            assert sample.start_ns <= proxy.start_ns <= engine.start_ns
            (decode,) = [s for s in spans if s.parent_id == engine.span_id and s.name == "engine.decode"]
            assert decode.start_ns <= decode.end_ns <= sample.end_ns
        assert {s.attributes.get("prompt_id", prompt_id) for s in spans} == {prompt_id}
        assert {s.attributes.get("run_id", "traced") for s in spans} == {"traced"}
        assert {s.attributes["attempt"] for s in spans if "attempt" in s.attributes} == {1}
        assert one(spans, "buffer.seal").attributes["outcome"] == "sealed"
        assert not any(s.failed for s in spans)
        part = one(spans, "trainer.train")
        assert (part.attributes["step"], part.attributes["outcome"]) == (step, "trained")


def test_a_step_and_its_groups_are_linked_both_ways(done: Done) -> None:
    steps = done.collector.named("trainer.step")
    assert [s.attributes["step"] for s in steps] == [1, 2, 3]
    for step in steps:
        number = step.attributes["step"]
        parts = [s for s in done.collector.named("trainer.train") if s.attributes["step"] == number]
        assert len(parts) == GROUPS
        assert all(part.links == ((step.trace_id, step.span_id),) for part in parts)
        assert {(part.trace_id, part.parent_id) for part in parts} == set(step.links)


def test_every_service_tells_under_its_own_name(done: Done) -> None:
    by_service = {s.service: s for s in done.collector.spans}
    names = ("feed", "buffer", "router", "rollout", "trainer", "engine")
    assert set(by_service) == {f"milepost-{name}" for name in names}
    assert len({s.instance for s in done.collector.spans}) == len(names)


def test_publications_are_traced_into_router_and_ledger(done: Done) -> None:
    (first, *_) = done.collector.named("trainer.publish")
    spans = done.collector.of_trace(first.trace_id)
    assert first.attributes["label"] == 0
    called = children(spans, first)
    for rpc in ("PrepareWeights", "UpdateWeights", "CommitWeights"):
        assert called[f"milepost.v1.RouterService/{rpc}"] == 1
    prepare = one(spans, "milepost.v1.RouterService/PrepareWeights")
    assert children(spans, prepare)["milepost.v1.WeightService/ReserveVersion"] == 1


def test_polls_and_watches_make_no_spans(done: Done) -> None:
    roots = {s.name for s in done.collector.spans if not s.parent_id}
    assert roots == {"feed.put", "trainer.step", "trainer.publish"}
    calls = {s.name for s in done.collector.spans if s.name.startswith("milepost.v1")}
    assert not [name for name in calls if POLLS.search(name)]
    prepares = {s.span_id for s in done.collector.named("milepost.v1.RouterService/PrepareWeights")}
    leases = done.collector.named("milepost.v1.WeightService/LeaseRouter")  # renewals are no part of it
    assert len(leases) <= len(prepares)
    assert {s.parent_id for s in leases} <= prepares


def test_a_prompt_that_is_dropped_ends_its_trace_at_the_gateway(done: Done) -> None:
    (root,) = [s for s in done.collector.named("feed.put") if s.attributes["prompt_id"] == LONG]
    rollout = one(done.collector.of_trace(root.trace_id), "gateway.rollout")
    assert rollout.attributes["outcome"] == "dropped_invalid"


def test_json_lines_say_which_run_prompt_and_step(done: Done) -> None:
    for name in ("buffer", "router", "rollout", "trainer", "engine-0"):
        for line in done.log_lines(name):
            assert {"timestamp", "level", "service", "logger", "event"} <= set(line), line
    steps = [x for x in done.log_lines("trainer") if "committed:" in x["event"]]
    assert [(x["run"], x["step"]) for x in steps] == [("traced", step) for step in (1, 2, 3)]
    assert [x["trace_id"] for x in steps] == [s.trace_id for s in done.collector.named("trainer.step")]
    (dropped,) = [x for x in done.log_lines("rollout") if x.get("prompt") == LONG]
    (root,) = [s for s in done.collector.named("feed.put") if s.attributes["prompt_id"] == LONG]
    assert (dropped["run"], dropped["level"], dropped["trace_id"]) == ("traced", "warning", root.trace_id)
    served = [x for x in done.log_lines("router") if x["event"].endswith("is served")]
    assert {(x["run"], x["version"], x["step"]) for x in served} >= {("traced", 1, 0), ("traced", 2, 1)}


async def test_without_a_collector_at_its_address_the_run_finishes_and_stops_in_time(
    model: Path, tmp_path: Path
) -> None:
    begun = time.monotonic()
    stack = await asyncio.to_thread(to_its_end, tmp_path, model, otlp_endpoint="http://127.0.0.1:1")
    minutes = 1 + (time.monotonic() - begun) // 60
    told = json.loads((stack.run_dir / "up.json").read_text())["services"]
    assert {name: service["starts"] for name, service in told.items()} == dict.fromkeys(told, 1)
    for log in sorted((stack.run_dir / "logs").glob("*.log")):
        assert "not stopped after" not in log.read_text()
        assert log.read_text().count("opentelemetry.exporter") <= 8 * minutes  # each level once a minute
