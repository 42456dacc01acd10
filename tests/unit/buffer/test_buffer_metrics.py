"""The buffer's metrics: what the ledger holds, and what this process did, as a scrape would see them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

import pytest

from milepost import types as t
from milepost.errors import ResourceExhausted, Unavailable
from milepost_buffer import metrics
from milepost_buffer.ledger import open_ledger
from milepost_buffer.metrics import MAX_RUNS, SPECS, LedgerView
from milepost_common.metrics import Instrument
from stack import until


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for a moment leaves no run out."""
    monkeypatch.setattr(metrics, "STATS_TIMEOUT_S", 60.0)


def numbers(instruments: list[Instrument], run_id: str = "") -> dict[tuple[str, ...], object]:
    """(name, labels without the run's ...) -> number, of one run where there is a run."""
    found: dict[tuple[str, ...], object] = {}
    for i in instruments:
        for labels, value in i.read():
            if i.spec.labels[:1] != ("run",):
                found[(i.spec.name, *labels)] = value
            elif labels[0] == run_id:
                found[(i.spec.name, *labels[1:])] = value
    return found


async def look(bench, run_id: str = "") -> dict[tuple[str, ...], object]:
    """What a scrape finds."""
    view = LedgerView(bench.ledger.accounts, bench.ledger.store)
    return numbers([*await view.refresh(), *bench.ledger.instruments], run_id or bench.run_id)


async def test_the_ledger_is_told_as_it_is(bench) -> None:
    await bench.train_step(1)
    await bench.put(3)
    (lease, *_) = await bench.lease(2)
    await bench.seal([lease])
    await bench.ledger.prompts.cancel(bench.run_id, prompt_ids=["p004"])

    stats, got = await bench.stats(), await look(bench)

    for state in ("waiting", "rolling", "ready", "assigned", "trained"):
        assert got["milepost_ledger_prompts", state] == getattr(stats, state), state
    assert got["milepost_ledger_prompts", "dropped"] == got["milepost_ledger_dropped", "cancelled"] == 1
    assert got["milepost_ledger_dropped", "stale"] == 0
    assert got["milepost_ledger_accepted",] == stats.accepted == 5
    assert (got["milepost_ledger_credits",], got["milepost_ledger_admissible",]) == (
        stats.credits,
        stats.admissible,
    )
    assert got["milepost_ledger_payload_bytes",] == stats.payload_bytes > 0
    assert got["milepost_ledger_payload_limit_bytes",] == 1_000_000
    assert got["milepost_ledger_step", "committed"] == got["milepost_ledger_step", "published"] == 1
    assert got["milepost_ledger_step", "trimmed"] == 0
    assert got["milepost_ledger_weight_version",] == stats.weight_version == 2
    assert (got["milepost_seals", "sealed"], got["milepost_seals", "lease_lost"]) == (3, 0)
    assert got["milepost_sealed_bytes",] == 300
    assert got["milepost_redis_up",] == 1


async def test_lease_expiries_and_refused_puts_are_counted(bench) -> None:
    await bench.put(2)
    await bench.lease(2)
    bench.clock.advance(11)
    got = await look(bench)
    assert got["milepost_ledger_lease_expiries",] == 2
    assert got["milepost_ledger_prompts", "waiting"] == 2

    with contextlib.suppress(ResourceExhausted):
        while True:
            await bench.put(1)
    with pytest.raises(ResourceExhausted):
        await bench.put(1)
    got = await look(bench)
    assert got["milepost_ledger_credits",] == 0
    assert got["milepost_puts_refused", "no_credits"] == 2


async def test_who_waits_for_what_is_counted_while_it_waits(bench) -> None:
    waiting = asyncio.create_task(bench.lease_step(1, max_wait_s=60.0))
    asking = asyncio.create_task(
        bench.ledger.prompts.lease(
            bench.run_id, gateway_id="gw", instance_id="gw-1", max_prompts=2, max_wait_s=60.0
        )
    )

    async def both_wait() -> bool:
        asked = {labels[0] for labels, _ in bench.ledger.store.seconds.read()}
        return {"lease", "lease_step"} <= asked

    await until("both wait", both_wait, within_s=30)
    await bench.put(2)
    leases = (await asyncio.wait_for(asking, 30)).leases
    await bench.seal(leases)
    assert (await asyncio.wait_for(waiting, 30)).groups
    waited = dict(bench.ledger.bell.waited.read())
    assert waited["gateway", "no prompts"] > 0
    assert waited["trainer", "groups"] > 0


async def test_calls_to_redis_are_timed_by_command_and_failures_by_reason(bench) -> None:
    await bench.put(1)
    seconds = {labels[0]: value for labels, value in bench.ledger.store.seconds.read()}
    assert sum(seconds["put"].counts) == 1
    assert 0 < seconds["put"].total < 100

    async with open_ledger(str(bench.ledger.link.url)) as other:
        await other.link.client.aclose()
        other.link.client.connection_pool.connection_kwargs["path"] = "/nowhere.sock"
        with pytest.raises(Unavailable):
            await other.store.call(bench.run_id, "stats")
        view = LedgerView(other.accounts, other.store)
        got = numbers([*await view.refresh(), *other.instruments])
    assert got["milepost_redis_up",] == 0
    assert not [name for name, *_ in got if name.startswith("milepost_ledger")], "nothing is made up"
    assert got["milepost_redis_errors", "REDIS_AWAY"] >= 2


async def test_a_run_of_another_schema_hides_no_other(bench, make_bench) -> None:
    async with make_bench() as other:
        client, key = bench.ledger.link.client, f"mp:{{{other.run_id}}}:run"
        schema = await client.hget(key, "schema")
        await client.hset(key, "schema", "99")
        try:
            got = await look(bench)
        finally:
            await client.hset(key, "schema", schema)
    assert got["milepost_redis_up",] == 1
    assert got["milepost_ledger_accepted",] == 0


async def test_of_many_runs_those_are_told_that_were_asked_about_last() -> None:
    class Many:
        asked_at: Mapping[str, float] = {"r90": 1.0, "r10": 2.0}

        async def runs(self) -> list[str]:
            return [f"r{i:02}" for i in range(100)]

        async def stats(self, run_id: str) -> t.RunStats:
            return t.RunStats(run_id=run_id, accepted=1)

    many = Many()
    found = {i.spec.name: i for i in await LedgerView(many, many).refresh()}
    told = [labels[0] for labels, _ in found["milepost_ledger_accepted"].read()]
    assert (told[:2], len(told)) == (["r10", "r90"], MAX_RUNS)


def test_specs_are_distinct() -> None:
    assert len({s.name for s in SPECS}) == len(SPECS)
