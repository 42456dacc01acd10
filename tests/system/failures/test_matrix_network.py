"""The network between any two services fails: deadlines end calls, retries mend them, nothing happens twice.

One run over eight hosts (network namespaces), one test a pair. Each cuts the pair, silently unless said
otherwise, until somebody says that it feels it, lets those go on who can, heals, and sees the run go on. The
last test is the judge of all of them: the audit with witnesses from outside, and a step log without a
repetition. Nobody is restarted: no service may exit because the network failed.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import netns
from hosts import BROKEN_S, CALL_S, HOSTS, REDIS_S, RUN, WEIGHTS_S, Eyes, Hosts, goes_on
from milepost.errors import Unavailable
from milepost.types import EngineState, PromptState
from milepost_rollout.gateway import LEASE_WAIT_S
from stack import ARITHMETIC, MILEPOST, run, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LEASE_TTL_S = 5.0
BUSY_S = 40.0
"""What a machine that does other work as well may add to any of these."""
FELT_S = BROKEN_S + LEASE_WAIT_S + CALL_S + BUSY_S
"""A cut is felt within this: the longest that a call waits and its deadline, or a connection that breaks."""
RECOVERED_S = BROKEN_S + LEASE_TTL_S + LEASE_WAIT_S + CALL_S + WEIGHTS_S + BUSY_S
"""After a cut: stuck connections break, lost leases expire, calls and a transaction run into deadlines."""
FINISHED_S = 180.0
OUT = (EngineState.DEAD, EngineState.QUARANTINED)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Hosts]:
    """The run, with more prompts than will be trained."""
    if reason := netns.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    data = folder / "data"
    run(sys.executable, ARITHMETIC / "make_data.py", "--out", data, "--train", "20000")
    with netns.Network(HOSTS) as network:
        started = Hosts(network, folder=folder, model=model, prompts=data / "train.jsonl")
        started.start()
        yield started


@pytest.fixture
async def eyes(hosts: Hosts) -> AsyncIterator[Eyes]:
    """Clients of the test; rows after one that broke the run fail at once."""
    if hosts.broken:
        pytest.fail(f"the run is broken since {hosts.broken}")
    async with hosts.eyes() as clients:
        yield clients


@pytest.fixture(autouse=True)
def tell(hosts: Hosts, request: pytest.FixtureRequest) -> Iterator[None]:
    """After a failure: marks the run as broken, and shows what everybody said."""
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before or hosts.ended().keys() - {"trainer"}:
        hosts.broken = hosts.broken or request.node.name
        print(hosts.logs())


Check = Callable[[], Awaitable[object]]


async def survives(
    hosts: Hosts,
    eyes: Eyes,
    cut: contextlib.AbstractContextManager[None],
    *,
    felt: dict[str, Check],
    meanwhile: Check | None = None,
) -> None:
    """One row: cut, felt, whoever can goes on, healed, all go on."""
    try:
        await goes_on(eyes, within_s=RECOVERED_S, steps=1)
        with cut:
            for what, check in felt.items():
                await until(what, check, within_s=FELT_S)
            if meanwhile is not None:
                await meanwhile()
        await goes_on(eyes, within_s=RECOVERED_S)
        await until("all engines serve", eyes.all_serve, within_s=RECOVERED_S)
        assert hosts.ended() == {}
    except BaseException:
        hosts.broken = hosts.broken or "a row that failed"
        raise


def says(hosts: Hosts, host: str, *words: str) -> Check:
    """A check: from now on a process says one of these."""
    start = len(hosts.said(host))

    async def check() -> bool:
        new = hosts.said(host)[start:]
        return any(word in new for word in words)

    return check


def gateway_waits(eyes: Eyes, word: str) -> Check:
    """A check: the gateway waits for something."""

    async def check() -> bool:
        return word in (await eyes.rollout()).waiting_for

    return check


def engine_is(eyes: Eyes, engine_id: str, *states: EngineState) -> Check:
    """A check: the router has an engine in one of these states."""

    async def check() -> bool:
        return (await eyes.engine(engine_id)).state in states

    return check


# ------------------------------------------------------------------ the ledger and its clients


async def test_feeder_and_buffer(hosts: Hosts, eyes: Eyes) -> None:
    async def trains_what_there_is() -> bool:
        stats = await eyes.stats()
        return stats.waiting + stats.rolling == 0

    felt = {
        "the feeder says that the buffer does not answer": says(hosts, "feeder", "does not answer"),
        "what was fed is rolled out": trains_what_there_is,
    }
    await survives(hosts, eyes, hosts.network.cut("feeder", "buffer"), felt=felt)


async def test_gateway_and_buffer(hosts: Hosts, eyes: Eyes) -> None:
    felt = {"the gateway waits for the ledger": gateway_waits(eyes, "ledger:")}
    await survives(hosts, eyes, hosts.network.cut("rollout", "buffer"), felt=felt)


async def test_trainer_and_buffer(hosts: Hosts, eyes: Eyes) -> None:
    felt = {"the trainer asks again": says(hosts, "trainer", "the buffer does not answer")}
    await survives(hosts, eyes, hosts.network.cut("trainer", "buffer"), felt=felt)


async def test_router_and_buffer(hosts: Hosts, eyes: Eyes) -> None:
    async def committed_to_the_bound() -> bool:
        now = await eyes.trainer.get_trainer_status()
        return now.phase == "waiting" and now.step > now.published_step

    felt = {
        "weights are not published": says(hosts, "trainer", "not published"),
        "the trainer stands at the staleness bound": committed_to_the_bound,
    }
    await survives(hosts, eyes, hosts.network.cut("router", "buffer"), felt=felt)


async def test_buffer_and_redis(hosts: Hosts, eyes: Eyes) -> None:
    async def unavailable() -> bool:
        try:
            await eyes.stats()
        except Unavailable as error:
            return error.reason == "REDIS_AWAY"
        return False

    felt = {
        "the buffer says that Redis is away": unavailable,
        "the trainer is told so": says(hosts, "trainer", "is away"),
        "the gateway waits for the ledger": gateway_waits(eyes, "ledger:"),
    }
    assert REDIS_S < CALL_S, "else the buffer cannot say it in time"
    await survives(hosts, eyes, hosts.network.cut("buffer", "redis"), felt=felt)


# ------------------------------------------------------------------ the router and its clients


async def test_gateway_and_router(hosts: Hosts, eyes: Eyes) -> None:
    felt = {"the gateway's connections break": gateway_waits(eyes, "engines:")}
    await survives(hosts, eyes, hosts.network.cut("rollout", "router"), felt=felt)


async def test_trainer_and_router(hosts: Hosts, eyes: Eyes) -> None:
    async def committed_to_the_bound() -> bool:
        now = await eyes.trainer.get_trainer_status()
        return now.phase == "waiting" and now.step > now.published_step

    felt = {
        "weights are not published": says(hosts, "trainer", "not published"),
        "the trainer stands at the staleness bound": committed_to_the_bound,
    }
    await survives(hosts, eyes, hosts.network.cut("trainer", "router"), felt=felt)


async def test_router_and_engine(hosts: Hosts, eyes: Eyes) -> None:
    felt = {"the engine is given up": engine_is(eyes, "engine-0", *OUT)}
    cut = hosts.network.cut("router", "engine-0")
    await survives(hosts, eyes, cut, felt=felt, meanwhile=lambda: goes_on(eyes, within_s=RECOVERED_S))


async def test_router_and_engine_that_refuse_one_another(hosts: Hosts, eyes: Eyes) -> None:
    if not hosts.network.can_refuse():
        pytest.skip("iptables cannot reject packets here")
    felt = {"the engine is given up": engine_is(eyes, "engine-1", *OUT)}
    cut = hosts.network.refusing("router", "engine-1")
    await survives(hosts, eyes, cut, felt=felt, meanwhile=lambda: goes_on(eyes, within_s=RECOVERED_S))


# ------------------------------------------------------------------ weights past the router


async def test_trainer_and_engine_in_mid_transaction(hosts: Hosts, eyes: Eyes) -> None:
    async def the_other_one_goes_on() -> None:
        await goes_on(eyes, within_s=RECOVERED_S)
        left_out = await eyes.engine("engine-0")
        assert left_out.state is not EngineState.SERVING, "it serves what others have left behind"

    updating = engine_is(eyes, "engine-0", EngineState.UPDATING)
    await until("weights are on their way", updating, within_s=RECOVERED_S)
    felt = {"the transaction ends": says(hosts, "router", "its process group broke")}
    cut = hosts.network.cut("trainer", "engine-0")
    await survives(hosts, eyes, cut, felt=felt, meanwhile=the_other_one_goes_on)


# ------------------------------------------------------------------ requests arrive, answers are lost


async def test_answers_of_an_engine_are_lost(hosts: Hosts, eyes: Eyes) -> None:
    felt = {"the engine is given up": engine_is(eyes, "engine-0", *OUT)}
    cut = hosts.network.deaf(to="router", from_="engine-0")
    await survives(hosts, eyes, cut, felt=felt, meanwhile=lambda: goes_on(eyes, within_s=RECOVERED_S))


async def test_answers_of_the_buffer_are_lost(hosts: Hosts, eyes: Eyes) -> None:
    """Of PutPrompts, LeasePrompts, PutGroups, LeaseStep, CommitStep, PublishVersion, all at once."""
    network = hosts.network

    @contextlib.contextmanager
    def unheard() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for host in ("feeder", "rollout", "trainer", "router"):
                stack.enter_context(network.deaf(to=host, from_="buffer"))
            yield

    async def unknown_seals() -> int:
        """Groups that the ledger has sealed and the gateway does not know of, give or take a constant."""
        while True:
            known = (await eyes.rollout()).groups_sealed
            stats = await eyes.stats()
            if (await eyes.rollout()).groups_sealed == known:
                return stats.ready + stats.assigned + stats.trained - known

    usual = min([await unknown_seals() for _ in range(10)])
    unheard_of = False

    async def look() -> None:
        """Did the buffer seal, lease or commit something of which the caller does not know?"""
        nonlocal unheard_of
        stats, gateway = await eyes.stats(), await eyes.rollout()
        trainer = await eyes.trainer.get_trainer_status()
        leased = trainer.phase == "waiting" and stats.leased_step > trainer.step
        claimed = stats.rolling > gateway.groups_in_flight or stats.committed_step > trainer.step
        unheard_of = unheard_of or leased or claimed or await unknown_seals() > usual

    for _ in range(4):  # a cut may come between two calls: then nothing was lost
        felt = {
            "the gateway waits for the ledger": gateway_waits(eyes, "ledger:"),
            "the trainer asks again": says(hosts, "trainer", "the buffer does not answer", "not published"),
        }
        await survives(hosts, eyes, unheard(), felt=felt, meanwhile=look)
        if unheard_of:
            return
    pytest.fail("no answer was lost in four cuts")


# ------------------------------------------------------------------ the judge


async def test_at_the_end_nothing_is_lost_and_nothing_happened_twice(hosts: Hosts, eyes: Eyes) -> None:
    assert hosts.ended() == {}, "a service ended because the network failed"
    hosts.stop_feeding()
    await eyes.buffer.close_source(RUN, source_id="train.jsonl")

    async def finished() -> bool:
        return (await eyes.buffer.get_run(RUN)).finished and "trainer" in hosts.ended()

    await until("the run is finished", finished, within_s=FINISHED_S)
    assert hosts.ended() == {"trainer": 0}

    report = run(
        MILEPOST, "ledger", "--run", RUN, "--buffer", eyes.buffer.address, "--audit",
        "--witness", hosts.folder / "acknowledged.jsonl", "--witness", hosts.folder / "steps.jsonl",
        "--witness", hosts.folder / "checkpoints",
    )  # fmt: skip
    assert "lost 0, twice 0, beyond the staleness bound 0" in report
    assert "the audit closes" in report

    steps = [json.loads(line) for line in (hosts.folder / "steps.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(1, len(steps) + 1)), (
        "each step was trained once, in order"
    )
    trained = [prompt_id for step in steps for prompt_id in step["prompt_ids"]]
    assert len(trained) == len(set(trained)), "a prompt was trained twice"
    rows = {row.prompt_id: row async for row in eyes.buffer.get_ledger(RUN)}
    assert {p for p, row in rows.items() if row.state is PromptState.TRAINED} == set(trained)
    acknowledged = (hosts.folder / "acknowledged.jsonl").read_text().splitlines()
    fed = [prompt_id for line in acknowledged for prompt_id in json.loads(line)["accepted"]]
    assert set(fed) <= set(rows), "an accepted prompt is not in the ledger"
