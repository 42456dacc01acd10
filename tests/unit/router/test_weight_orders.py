"""Engines with our own loader of weights: one order for all of it, and a report that must say it was done."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from milepost import errors
from milepost import types as t
from milepost.types import Transport
from milepost_router.probe import WEIGHT_HOOK, capabilities_of
from milepost_router.record import Transition
from milepost_router.upstream import Connection

INFO = {"version": "0.5.17", "tp_size": 1}


REPORT, SIGNAL = "milepost.report", "milepost.signal:"


class Loader:
    """The hook's side of a fake engine: what its report says.

    Attributes:
      asked: what the engine was asked in its updates, in order; reports by themselves left out.
    """

    def __init__(
        self,
        fake: Any,
        *,
        message: str = "",
        transaction: str = "",
        takes_signals: bool = True,
        on_signal: Callable[[], None] = lambda: None,
    ) -> None:
        self.message, self.transaction, self.takes_signals = message, transaction, takes_signals
        self.done = ""
        self._fake, self._on_signal = fake, on_signal
        fake.reactions["update_weights_from_tensor"] = self._load
        fake.reactions["get_weights_by_name"] = self._report

    async def _load(self, request: web.Request, body: Any) -> None:
        self.done = json.loads(body["serialized_named_tensors"][0])["transaction"]

    async def _report(self, request: web.Request, body: Any) -> web.Response:
        name: str = body["name"]
        if name.startswith(SIGNAL):
            self.done = json.loads(name.removeprefix(SIGNAL))["transaction"]
            self._on_signal()
        else:
            assert name == REPORT
        said = {
            "transaction": self.transaction or self.done,
            "ok": not self.message,
            "message": self.message,
            "takes_signals": self.takes_signals,
        }
        return web.json_response([float(byte) for byte in json.dumps(said).encode()])

    @property
    def asked(self) -> list[str]:
        names = iter([body["name"] for body in self._fake.bodies.get("get_weights_by_name", ())])
        calls = [
            "signal" if call == "get_weights_by_name" and next(names) != REPORT else call
            for call in self._fake.calls
        ]
        return [short for call in calls if (short := SHORT.get(call))]


SHORT = {
    "update_weight_version": "name",
    "pause_generation": "pause",
    "update_weights_from_tensor": "order",
    "signal": "signal",
    "flush_cache": "flush",
    "continue_generation": "continue",
    "abort_request": "abort",
}


def order(prepared: t.Prepared, *, again: bool = False, **changes: Any) -> t.BucketHeader:
    """All weights at once, for each member's loader; `again`: from where it has copied before."""
    text = json.dumps({"transaction": prepared.transaction_id})
    handles = tuple(
        t.HandlesOfEngine(
            engine_id=m.engine_id,
            handles=(text.encode(),),
            load_format=m.weight_hook,
            signal=text if again else "",
        )
        for m in prepared.members
    )
    given: dict[str, Any] = {
        "transaction_id": prepared.transaction_id,
        "fleet_epoch": prepared.fleet_epoch,
        "bucket_index": 0,
        "handles": handles,
        "size_bytes": 16,
        "whole": True,
    }
    return t.BucketHeader(**(given | changes))


def launched(bench: Any, fake: Any) -> None:
    """It joins as SGLang before 0.5.19 with our hook in it, and without a prefix cache."""
    bench.join(
        fake,
        engine="sglang 0.5.17",
        update_session=False,
        version_spans=False,
        transports=(Transport.CUDA_IPC,),
        gpu_uuids=("GPU-1",),
        weight_hook=WEIGHT_HOOK,
    )
    bench.record(fake.name).caches_prefixes = False


@pytest.fixture
async def bench(tools: Any, fake_engine: Any) -> AsyncIterator[Any]:
    """Two engines on one GPU that were launched with our hook; nobody compares checksums."""
    made = tools.bench(verify_checksum=False)
    for name in ("a", "b"):
        launched(made, await fake_engine(name))
    yield made
    await made.transactions.close()
    made.pool.close()


async def prepare(bench: Any, tools: Any, **changes: Any) -> t.Prepared:
    return await bench.transactions.prepare(tools.request(transport=Transport.CUDA_IPC, **changes))


def test_a_server_says_itself_that_it_has_our_loader():
    assert capabilities_of(INFO | {"custom_weight_loader": ["x", WEIGHT_HOOK]}).weight_hook == WEIGHT_HOOK
    assert capabilities_of(INFO | {"custom_weight_loader": None}).weight_hook == ""
    assert capabilities_of(INFO).weight_hook == ""


async def test_an_engine_at_rest_is_marked_loaded_and_named_and_nothing_else(bench, tools):
    for fake in bench.engines.values():
        Loader(fake)
    prepared = await prepare(bench, tools)
    assert [(m.weight_hook, m.instance_id) for m in prepared.members] == [(WEIGHT_HOOK, "i")] * 2
    transaction = bench.transactions.find(prepared.transaction_id)
    ack = await transaction.take(order(prepared))
    assert all(a.ok for a in ack.acks)
    committed = await tools.commit(bench, prepared, num_buckets=1)
    assert (committed.serving, committed.quarantined) == (("a", "b"), {})
    fake = bench.engines["a"]
    asked = [call for call in fake.calls if call != "get_weights_by_name"]
    assert asked == ["update_weight_version", "update_weights_from_tensor", "update_weight_version"]
    assert "GET /model_info" not in fake.looks
    [body] = fake.bodies["update_weights_from_tensor"]
    assert body["load_format"] == WEIGHT_HOOK
    assert (body["flush_cache"], body["abort_all_requests"]) == (False, False)
    assert [b["new_version"] for b in fake.bodies["update_weight_version"]] == [
        f"updating/{prepared.transaction_id}",
        "run/1/0",
    ]


@pytest.mark.parametrize("spans", [False, True])
async def test_an_engine_with_requests_is_paused_and_goes_on(spans: bool, bench, tools):
    for fake in bench.engines.values():
        Loader(fake)
    record = bench.record("a")
    record.capabilities = replace(record.capabilities, version_spans=spans)
    bench.fleet.request_started(record)
    prepared = await prepare(bench, tools)
    await bench.transactions.find(prepared.transaction_id).take(order(prepared))
    await tools.commit(bench, prepared, num_buckets=1)
    opening = ["update_weight_version", "pause_generation"]
    assert [call for call in bench.engines["a"].calls if call != "get_weights_by_name"] == [
        *(reversed(opening) if spans else opening),
        "update_weights_from_tensor",
        "update_weight_version",
        "continue_generation",
    ]
    assert "pause_generation" not in bench.engines["b"].calls


async def update_twice(
    bench: Any, tools: Any, *, mode: t.PauseMode = t.PauseMode.IN_PLACE, in_flight: int = 1, **loader: Any
) -> list[str]:
    """Gives weights to engine a twice from the same places; returns what it was asked the second time."""
    loaders = {name: Loader(fake, **loader) for name, fake in bench.engines.items()}
    before = 0
    for label in (0, 1):
        before = len(loaders["a"].asked)
        prepared = await prepare(bench, tools, label=label, pause_mode=mode)
        for _ in range(in_flight * label):
            bench.fleet.request_started(bench.record("a"))
        await bench.transactions.find(prepared.transaction_id).take(order(prepared, again=label == 1))
        committed = await tools.commit(bench, prepared, num_buckets=1)
        assert (committed.serving, committed.quarantined) == (("a", "b"), {})
    assert bench.engines["a"].version_string == "run/2/1"
    assert not bench.engines["a"].paused
    return loaders["a"].asked[before:]


async def test_an_engine_at_rest_is_told_by_a_signal_where_it_has_copied_before(bench, tools):
    assert await update_twice(bench, tools, in_flight=0) == ["name", "signal", "name"]


async def test_an_engine_with_requests_runs_on_through_a_signal(bench, tools):
    """Replies that end from the signal on name what they may end with."""
    record, ends, states = bench.record("a"), [], []
    bench.fleet.subscribe(lambda transition: states.append((record.state.name, record.version)))
    asked = await update_twice(bench, tools, on_signal=lambda: ends.append((record.version, record.label)))
    assert asked == ["name", "signal", "name"]
    assert ends[-1] == (2, 1), "the version that is not known to be there yet"
    assert states[-1] == ("SERVING", 2)


@pytest.mark.parametrize(
    ("able", "mode", "asked"),
    [
        ({}, t.PauseMode.RETRACT, ["name", "pause", "signal", "name", "continue"]),
        ({"version_spans": True}, t.PauseMode.IN_PLACE, ["pause", "name", "signal", "name", "continue"]),
    ],
    ids=["retract", "spans"],
)
async def test_engines_whose_tokens_would_be_miscounted_are_paused_for_a_signal(
    bench, tools, able, mode, asked
):
    record = bench.record("a")
    record.capabilities = replace(record.capabilities, **able)
    assert await update_twice(bench, tools, mode=mode) == asked


async def test_engines_that_cache_prefixes_are_paused_for_a_signal(bench, tools):
    bench.record("a").caches_prefixes = True
    asked = await update_twice(bench, tools)
    assert asked[:3] == ["name", "pause", "signal"]
    assert sorted(asked[3:5]) == ["flush", "name"]
    assert asked[5:] == ["continue"]


async def test_engines_whose_weights_are_compared_are_paused_for_a_signal(tools, fake_engine):
    bench = tools.bench()
    for name in ("a", "b"):
        launched(bench, await fake_engine(name))
    try:
        assert await update_twice(bench, tools) == ["name", "pause", "signal", "name", "continue"]
    finally:
        await bench.transactions.close()
        bench.pool.close()


async def test_a_loader_that_takes_no_signals_is_given_the_order(bench, tools):
    """As one of an engine of several ranks."""
    asked = await update_twice(bench, tools, takes_signals=False)
    assert asked == ["name", "pause", "order", "name", "continue"]


async def test_an_engine_that_was_started_again_takes_no_signal_before_it_says_so(bench, tools):
    await update_twice(bench, tools)
    record = bench.record("a")
    assert record.takes_signals
    bench.fleet.join(t.Engine(engine_id="a", url=record.url, run_id="run", instance_id="another"), now=0.0)
    assert not record.takes_signals


async def test_who_runs_on_loses_its_requests_when_its_update_is_given_up(bench, tools):
    """The trainer is gone before anybody knows what became of the signal."""
    await update_twice(bench, tools)
    fake = bench.engines["a"]
    fake.hang("get_weights_by_name")
    withdrawn: list[tuple[str, int]] = []

    def look(transition: Transition | None) -> None:
        if transition is not None and transition.withdrawn:
            withdrawn.append((transition.engine.engine_id, fake.calls.count("abort_request")))

    bench.fleet.subscribe(look)
    prepared = await prepare(bench, tools, label=2, pause_mode=t.PauseMode.IN_PLACE)
    transaction = bench.transactions.find(prepared.transaction_id)
    signals = fake.calls.count("get_weights_by_name")
    taking = asyncio.create_task(transaction.take(order(prepared, again=True)))
    await tools.until(lambda: fake.calls.count("get_weights_by_name") > signals)
    stale = await bench.transactions.abort(prepared.transaction_id, term=1, reason="the trainer is gone")
    with pytest.raises(errors.FailedPrecondition):
        await taking
    assert stale == ("a", "b")
    assert withdrawn == [("a", 0)], "gone before they could be answered; b has none"
    assert fake.calls.count("abort_request") == 1
    assert bench.states() == {"a": "STALE", "b": "STALE"}
    assert bench.record("a").version == 0


async def test_who_runs_on_is_as_before_where_its_update_is_given_up_before_its_signal(bench, tools):
    """Another member is still being told when the trainer goes."""
    await update_twice(bench, tools)
    other = bench.record("b")
    other.capabilities = replace(other.capabilities, update_session=True)
    bench.engines["b"].hang("begin_weight_update")
    withdrawn: list[str] = []
    bench.fleet.subscribe(lambda x: withdrawn.append(x.engine.engine_id) if x and x.withdrawn else None)
    prepared = await prepare(bench, tools, label=2, pause_mode=t.PauseMode.IN_PLACE)
    taking = asyncio.create_task(
        bench.transactions.find(prepared.transaction_id).take(order(prepared, again=True))
    )
    await bench.engines["b"].called("begin_weight_update")
    await bench.transactions.abort(prepared.transaction_id, term=1, reason="the trainer is gone")
    with pytest.raises(errors.FailedPrecondition):
        await taking
    record = bench.record("a")
    assert (record.state.name, record.version, record.label) == ("SERVING", 2, 1)
    assert record.version_string == bench.engines["a"].version_string == "run/2/1"
    assert "a" not in withdrawn


async def test_an_engine_with_an_update_session_takes_no_signal(bench, tools):
    record = bench.record("a")
    record.capabilities = replace(record.capabilities, update_session=True)
    asked = await update_twice(bench, tools)
    assert "order" in asked
    assert "signal" not in asked


async def test_who_drains_while_it_runs_on_and_fails_loses_its_requests(bench, tools):
    await update_twice(bench, tools)
    prepared = await prepare(bench, tools, label=2, pause_mode=t.PauseMode.IN_PLACE)
    Loader(bench.engines["a"], message="out of memory", on_signal=lambda: bench.fleet.drain("a"))
    seen: list[tuple[str, bool]] = []
    bench.fleet.subscribe(lambda x: seen.append((x.engine.engine_id, x.withdrawn)) if x else None)
    await bench.transactions.find(prepared.transaction_id).take(order(prepared, again=True))
    assert bench.states()["a"] == "DRAINING"
    assert ("a", True) in seen


async def test_an_engine_that_refuses_a_signal_is_quarantined_alone(bench, tools):
    await update_twice(bench, tools)
    prepared = await prepare(bench, tools, label=2, pause_mode=t.PauseMode.IN_PLACE)
    bench.engines["a"].refuse("get_weights_by_name", "Get parameter by name failed")
    taken = await bench.transactions.find(prepared.transaction_id).take(order(prepared, again=True))
    assert {a.engine_id: a.ok for a in taken.acks} == {"a": False, "b": True}
    assert (await tools.commit(bench, prepared, num_buckets=1)).serving == ("b",)
    assert bench.states() == {"a": "QUARANTINED", "b": "SERVING"}


@pytest.mark.parametrize(
    "says", [{"message": "out of memory"}, {"transaction": "another"}], ids=["failed", "restarted"]
)
async def test_an_engine_whose_loader_failed_is_quarantined_alone(bench, tools, says):
    Loader(bench.engines["a"], **says)
    Loader(bench.engines["b"])
    prepared = await prepare(bench, tools)
    ack = await bench.transactions.find(prepared.transaction_id).take(order(prepared))
    assert {a.engine_id: a.ok for a in ack.acks} == {"a": False, "b": True}
    assert says.get("message", "it restarted") in ack.acks[0].message
    committed = await tools.commit(bench, prepared, num_buckets=1)
    assert committed.serving == ("b",)
    assert bench.states() == {"a": "QUARANTINED", "b": "SERVING"}


@pytest.mark.parametrize("step", ["update_weight_version", "pause_generation"])
async def test_an_engine_that_is_silent_before_its_order_costs_the_others_one_call(
    step: str, tools, fake_engine
):
    bench = tools.bench(verify_checksum=False, bucket_timeout_s=3600.0, call_timeout_s=0.3)
    for name in ("a", "b"):
        fake = await fake_engine(name)
        Loader(fake)
        bench.join(
            fake, engine="sglang 0.5.17", update_session=False, version_spans=False, weight_hook=WEIGHT_HOOK
        )
        bench.fleet.request_started(bench.record(name))
    bench.engines["a"].hang(step)
    try:
        prepared = await prepare(bench, tools)
        async with asyncio.timeout(60):
            ack = await bench.transactions.find(prepared.transaction_id).take(order(prepared))
        assert {a.engine_id: a.ok for a in ack.acks} == {"a": False, "b": True}
        assert "no answer within 0.3 s" in ack.acks[0].message
        assert (await tools.commit(bench, prepared, num_buckets=1)).serving == ("b",)
        assert bench.states() == {"a": "QUARANTINED", "b": "SERVING"}
    finally:
        await bench.transactions.close()
        bench.pool.close()


async def test_an_engine_that_gives_no_report_has_failed(bench, tools):
    Loader(bench.engines["b"])
    prepared = await prepare(bench, tools)
    ack = await bench.transactions.find(prepared.transaction_id).take(order(prepared))
    assert {a.engine_id: a.ok for a in ack.acks} == {"a": False, "b": True}


async def test_checksums_are_compared_where_that_is_asked_for(tools, fake_engine):
    bench = tools.bench()
    for name, checksum in (("a", "one"), ("b", "other")):
        fake = await fake_engine(name)
        fake.checksum = checksum
        Loader(fake)
        able = (Transport.CUDA_IPC,)
        bench.join(
            fake, engine="sglang 0.5.17", update_session=False, transports=able, weight_hook=WEIGHT_HOOK
        )
    try:
        prepared = await prepare(bench, tools)
        await bench.transactions.find(prepared.transaction_id).take(order(prepared))
        with pytest.raises(errors.DataLoss):
            await tools.commit(bench, prepared, num_buckets=1)
    finally:
        await bench.transactions.close()
        bench.pool.close()


@pytest.mark.parametrize(
    "changes", [{"bucket_index": 1}, {"tensors": (t.TensorSpec(name="w0", dtype="float32", shape=(2,)),)}]
)
async def test_a_whole_model_is_one_bucket_without_tensors(bench, tools, changes):
    prepared = await prepare(bench, tools)
    with pytest.raises(errors.InvalidArgument):
        await bench.transactions.find(prepared.transaction_id).take(order(prepared, **changes))
    assert all(not fake.calls for fake in bench.engines.values())


# ------------------------------------------------------------------------------- served before it is named


class HeldName:
    """Engine a is not told the name of its weights before `may_go`; it is `asked` for it."""

    def __init__(self, bench: Any) -> None:
        self.asked, self.may_go = asyncio.Event(), asyncio.Event()
        self.fails = False
        bench.engines["a"].reactions["update_weight_version"] = self._react

    async def _react(self, request: web.Request, body: Any) -> web.Response | None:
        if not body["new_version"].startswith("run/"):
            return None
        self.asked.set()
        await self.may_go.wait()
        return web.Response(status=500) if self.fails else None


@pytest.fixture
def held(bench: Any) -> Iterator[HeldName]:
    """Nobody waits for it any more once the test is over, however that went."""
    held = HeldName(bench)
    yield held
    held.may_go.set()


async def name_held(bench: Any, tools: Any, held: HeldName) -> tuple[t.Prepared, asyncio.Task[Any]]:
    """Version 1 is in both engines, which have no requests; b is done, a waits for its name."""
    for fake in bench.engines.values():
        Loader(fake)
    prepared = await prepare(bench, tools)
    await bench.transactions.find(prepared.transaction_id).take(order(prepared))
    task = asyncio.create_task(tools.commit(bench, prepared, num_buckets=1))
    async with asyncio.timeout(10):
        await held.asked.wait()
    return prepared, task


@pytest.fixture
async def naming(
    bench: Any, tools: Any, held: HeldName
) -> AsyncIterator[tuple[HeldName, t.Prepared, asyncio.Task[Any]]]:
    """As `name_held`; the ledger has answered."""
    prepared, task = await name_held(bench, tools, held)
    yield held, prepared, task
    held.may_go.set()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_engine_at_rest_is_served_from_before_it_is_named(bench, tools, naming):
    held, prepared, task = naming
    record, fake = bench.record("a"), bench.engines["a"]
    assert (record.state.name, record.version, record.label) == ("SERVING", 1, 0)
    assert record.routable
    assert fake.version_string == f"updating/{prepared.transaction_id}"
    assert not task.done(), "the commit waits for the name"
    assert not bench.fleet.eligible(record, 1e9), "it has not left its transaction"
    bench.fleet.probe_ok(record, fake.version_string, generation=record.generation, now=0.0)
    assert record.state.name == "SERVING", "its mark does not say that it was started again"
    early = record.generation
    held.may_go.set()
    committed = await task
    assert (committed.serving, committed.quarantined) == (("a", "b"), {})
    assert fake.version_string == record.version_string == "run/1/0"
    bench.fleet.probe_ok(record, f"updating/{prepared.transaction_id}", generation=early, now=0.0)
    assert record.state.name == "SERVING", "what was read before it was named says nothing"
    assert bench.fleet.eligible(record, 1e9)


@pytest.mark.parametrize("why", ["requests", "spans", "prefixes"])
async def test_an_engine_that_is_paused_or_speaks_for_itself_is_named_before_it_is_served_from(
    why, bench, tools, held
):
    for fake in bench.engines.values():
        Loader(fake)
    record = bench.record("a")
    if why == "requests":
        bench.fleet.request_started(record)
    record.caches_prefixes = why == "prefixes"
    record.capabilities = replace(record.capabilities, version_spans=why == "spans")
    prepared = await prepare(bench, tools)
    await bench.transactions.find(prepared.transaction_id).take(order(prepared))
    task = asyncio.create_task(tools.commit(bench, prepared, num_buckets=1))
    async with asyncio.timeout(10):
        await held.asked.wait()
    assert bench.states() == {"a": "UPDATING", "b": "SERVING"}
    held.may_go.set()
    assert (await task).serving == ("a", "b")


async def test_who_is_served_from_unnamed_loses_its_requests_when_the_ledger_refuses(bench, tools, held):
    ledger = tools.HeldLedger(bench)
    prepared, task = await name_held(bench, tools, held)
    withdrawn: list[str] = []
    bench.fleet.subscribe(lambda x: withdrawn.append(x.engine.engine_id) if x and x.withdrawn else None)
    bench.ledger.refusal = errors.StaleTerm("term 1 is over")
    ledger.answer()
    await tools.until(lambda: bench.states() == {"a": "STALE", "b": "STALE"})
    assert withdrawn == ["a", "b"], "before it has its name"
    held.may_go.set()
    with pytest.raises(errors.StaleTerm):
        await task
    record, fake = bench.record("a"), bench.engines["a"]
    assert fake.version_string == record.version_string == f"updating/{prepared.transaction_id}"
    assert (record.state.name, record.transaction) == ("STALE", "")
    assert "abort_request" in fake.calls


async def test_who_is_served_from_and_does_not_take_its_name_is_quarantined_alone(bench, tools, naming):
    held, _, task = naming
    held.fails = True
    held.may_go.set()
    committed = await task
    assert committed.serving == ("b",)
    assert "update_weight_version" in committed.quarantined["a"]
    assert bench.states() == {"a": "QUARANTINED", "b": "SERVING"}
    assert bench.record("a").version == 0


async def test_who_is_drained_while_it_waits_for_its_name_is_named_first(bench, tools, naming):
    held, _, task = naming
    record = bench.fleet.drain("a")
    assert (record.state.name, record.routable) == ("SERVING", False)
    held.may_go.set()
    committed = await task
    assert committed.quarantined == {}
    assert bench.states() == {"a": "DRAINING", "b": "SERVING"}
    assert bench.engines["a"].version_string == "run/1/0"
    assert record.transaction == ""


async def test_who_was_drained_before_is_not_served_from_any_more(bench, tools):
    for fake in bench.engines.values():
        Loader(fake)
    prepared = await prepare(bench, tools)
    await bench.transactions.find(prepared.transaction_id).take(order(prepared))
    bench.fleet.drain("a")
    committed = await tools.commit(bench, prepared, num_buckets=1)
    assert committed.quarantined == {}
    assert bench.states() == {"a": "DRAINING", "b": "SERVING"}


async def test_who_is_lost_while_it_waits_for_its_name_is_the_fleets_affair(bench, tools, naming):
    held, _, task = naming
    record = bench.record("a")
    bench.fleet.quarantine(record, "5 requests in a row failed", now=0.0)
    held.may_go.set()
    committed = await task
    assert committed.serving == ("b",)
    assert bench.states() == {"a": "QUARANTINED", "b": "SERVING"}
    assert (record.version, record.transaction) == (0, "")


async def test_the_name_is_sent_before_any_request_that_waited(bench, tools, monkeypatch):
    """Behind them, it and the commit would wait for all that they have an engine do."""
    events: list[str] = []
    send = Connection.send

    def sent(self: Connection, head: bytes, body: bytes, **more: Any) -> None:
        if b"run/1/0" in head + body:
            events.append("name")
        send(self, head, body, **more)

    def woken(transition: Transition | None) -> None:
        if transition is not None and transition.after is t.EngineState.SERVING:
            asyncio.get_running_loop().call_soon(events.append, "request")

    monkeypatch.setattr(Connection, "send", sent)
    bench.fleet.remove("b")
    Loader(bench.engines["a"])
    prepared = await prepare(bench, tools)
    await bench.transactions.find(prepared.transaction_id).take(order(prepared))
    bench.fleet.subscribe(woken)
    await tools.commit(bench, prepared, num_buckets=1)
    assert events == ["name", "request"]
