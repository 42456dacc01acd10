"""What probes make of engines: well, silent, rubbish, half updated."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from milepost import types as t
from milepost.types import EngineState, Transport
from milepost_router import probe
from milepost_router.fleet import Fleet, FleetLimits
from milepost_router.probe import Prober
from milepost_router.upstream import Pool


class Judge:
    """A ledger that answers as it is told, when it is told to."""

    def __init__(self, why_not: str = "") -> None:
        self.why_not = why_not
        self.asked: list[Any] = []
        self.answer = asyncio.Event()
        self.answer.set()

    async def judge(self, loaded: Any, members: tuple[str, ...]) -> str:
        self.asked.append((str(loaded), members))
        await self.answer.wait()
        return self.why_not


class Watch:
    """One fake engine, probed."""

    def __init__(self, fake: Any, judge: Judge | None) -> None:
        self.fleet = Fleet(unversioned=judge is None, limits=FleetLimits(probe_failures=2))
        self.pool = Pool(connect_timeout_s=30.0)
        ledger: Any = judge
        self.prober = Prober(
            self.fleet,
            self.pool,
            lambda record: fake.api(self.pool, record, timeout_s=0.3),
            ledger=ledger,
            interval_s=0.02,
            timeout_s=0.3,
        )
        self.record = self.fleet.join(t.Engine(engine_id=fake.name, url=fake.url), now=0.0)

    async def __aenter__(self) -> Watch:
        self.prober.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.prober.close()
        self.pool.close()

    async def until(self, state: EngineState, says: str = "") -> None:
        async with asyncio.timeout(30):
            while self.record.state is not state or says not in self.record.detail:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


async def test_proven_weights_are_resumed_and_served(fake_engine):
    fake = await fake_engine("a")
    fake.version_string, fake.paused = "run/3/2", True
    judge = Judge()
    async with Watch(fake, judge) as watch:
        await watch.until(EngineState.SERVING)
        assert (watch.record.version, watch.record.label, watch.record.run_id) == (3, 2, "run")
        assert judge.asked[0] == ("run/3/2", ("a",))
        assert not fake.paused, "the router that paused it may be gone"
        assert watch.record.capabilities.engine == "milepost 0.5.21"


async def test_weights_that_are_not_proven_are_not_served_and_the_reason_is_told(fake_engine):
    fake = await fake_engine("a")
    fake.version_string = "run/3/2"
    judge = Judge("the ledger knows better")
    async with Watch(fake, judge) as watch:
        await watch.until(EngineState.STALE, "the ledger knows better")
        judge.why_not = ""
        await watch.until(EngineState.SERVING)


async def test_a_proof_that_comes_too_late_proves_nothing(fake_engine):
    fake = await fake_engine("a")
    fake.version_string = "run/3/2"
    judge = Judge()
    judge.answer.clear()
    async with Watch(fake, judge) as watch:
        async with asyncio.timeout(10):
            while not judge.asked:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        watch.fleet.reserve(watch.record, "tx", run_id="run")
        judge.answer.set()
        await asyncio.gather(*watch.prober._looks.values())
        assert watch.record.state is EngineState.STALE
        assert watch.record.transaction == "tx"


async def test_an_engine_left_in_mid_update_has_its_requests_ended(fake_engine):
    fake = await fake_engine("a")
    fake.version_string, fake.paused = "updating/run/1/2/1", True
    async with Watch(fake, Judge()) as watch:
        await watch.until(EngineState.STALE, "never finished")
        await fake.called("continue_generation")
        assert fake.calls == ["abort_request", "continue_generation"]
        assert not fake.paused


async def test_without_a_ledger_weights_have_no_version(fake_engine):
    fake = await fake_engine("a")
    async with Watch(fake, None) as watch:
        await watch.until(EngineState.SERVING)
        assert watch.record.version == 0
        assert fake.calls == []


@pytest.mark.parametrize("fault", ["break_down", "talk_rubbish", "hang", "hang_up", "refuse"])
async def test_an_engine_that_does_not_answer_well_is_dead_until_it_does(fake_engine, fault):
    fake = await fake_engine("a")
    async with Watch(fake, None) as watch:
        await watch.until(EngineState.SERVING)
        getattr(fake, fault)("model_info")
        await watch.until(EngineState.DEAD, "probes failed: a: GET /model_info")
        fake.reactions.clear()
        await watch.until(EngineState.SERVING)


async def test_a_version_that_is_no_string_is_rubbish(fake_engine):
    fake = await fake_engine("a")
    fake.version_string = 7
    async with Watch(fake, None) as watch:
        await watch.until(EngineState.DEAD, "weight_version = 7 is no string")


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (
            {"version": "0.5.17", "tp_size": 4, "context_length": 4096},
            t.EngineCapabilities(
                engine="sglang 0.5.17",
                checksum=True,
                transports=(Transport.NCCL, Transport.DISK),
                tensor_parallel_size=4,
                context_length=4096,
            ),
        ),
        (
            {"version": "0.5.21.post1", "engine": "milepost_engine", "context_length": None},
            t.EngineCapabilities(
                engine="milepost 0.5.21.post1",
                update_session=True,
                version_spans=True,
                checksum=True,
                transports=(Transport.GLOO, Transport.SHM, Transport.DISK),
            ),
        ),
        ({"version": 5, "tp_size": "x"}, None),
        ({}, None),
    ],
)
def test_what_an_engine_can_do_is_told_by_its_release(info, expected):
    found = probe.capabilities_of(info)
    if expected is None:
        assert not found.update_session or info.get("version") == 5
        assert found.tensor_parallel_size == 1
    else:
        assert found == expected


@pytest.mark.parametrize("uuids, by_ipc", [(("GPU-1", "GPU-2"), True), (("GPU-1",), False), ((), False)])
def test_cuda_ipc_needs_one_registered_gpu_a_rank(uuids, by_ipc):
    found = probe.capabilities_of({"version": "0.5.21", "tp_size": 2}, gpu_uuids=uuids)
    assert (Transport.CUDA_IPC in found.transports) is by_ipc
    assert found.gpu_uuids == uuids


def _without(routes: set[str]):
    async def answer(request: Any, body: Any) -> web.Response:
        return web.Response(status=404 if request.path in routes else 405)

    return answer


async def _sglang(fake_engine: Any, *, release: str, lacks: set[str]) -> Any:
    fake = await fake_engine("a")
    fake.kind, fake.release = "", release
    for path in ("begin_weight_update", "weights_checker"):
        fake.reactions[path] = _without(lacks)
    return fake


async def test_the_routes_of_sglang_say_what_it_can_do(fake_engine):
    fake = await _sglang(fake_engine, release="0.5.21", lacks={"/begin_weight_update"})
    async with Watch(fake, Judge()) as watch:
        await watch.until(EngineState.STALE)
        found = watch.record.capabilities
    assert (found.engine, found.update_session, found.checksum) == ("sglang 0.5.21", False, True)
    assert found.version_spans
    assert set(fake.calls) == {"continue_generation", "weights_checker"}, "looking changes nothing"


async def test_what_a_launcher_registered_is_kept(fake_engine):
    fake = await _sglang(fake_engine, release="0.5.17", lacks={"/begin_weight_update"})
    watch = Watch(fake, Judge())
    known = t.EngineCapabilities(gpu_uuids=("GPU-1",))
    engine = t.Engine(engine_id=fake.name, url=fake.url, instance_id="launched", capabilities=known)
    watch.record = watch.fleet.join(engine, now=0.0)
    async with watch:
        await watch.until(EngineState.STALE)
        found = watch.record.capabilities
    assert (found.engine, found.gpu_uuids) == ("sglang 0.5.17", ("GPU-1",))
    assert found.transports == (Transport.NCCL, Transport.CUDA_IPC, Transport.DISK)


async def test_a_paused_sglang_with_weights_is_not_asked_for_a_token(fake_engine):
    """Its /health generates one, and so fails while it is paused."""
    fake = await _sglang(fake_engine, release="0.5.21", lacks=set())
    fake.break_down("health")
    fake.version_string, fake.paused = "run/3/2", True
    async with Watch(fake, Judge()) as watch:
        await watch.until(EngineState.SERVING)
    assert not fake.paused
    assert "GET /health" not in fake.looks


async def test_a_starting_sglang_joins_when_it_has_generated_a_token(fake_engine):
    fake = await _sglang(fake_engine, release="0.5.21", lacks=set())
    fake.break_down("health")
    async with Watch(fake, Judge()) as watch:
        await watch.until(EngineState.DEAD, "probes failed: a: GET /health")
        fake.reactions.pop("health")
        await watch.until(EngineState.STALE)


@pytest.mark.parametrize(
    "release, info, warns",
    [
        ("0.5.20", {}, True),
        ("0.5.20", {"disable_radix_cache": True}, False),
        ("0.5.21", {"disable_radix_cache": False}, False),
    ],
)
async def test_prefixes_that_outlive_an_update_are_warned_of(fake_engine, caplog, release, info, warns):
    fake = await _sglang(fake_engine, release=release, lacks=set())
    fake.info = info
    async with Watch(fake, Judge()) as watch:
        await watch.until(EngineState.STALE)
    assert ("--disable-radix-cache" in caplog.text) is warns


async def test_an_engine_that_generates_is_not_held_up_by_asking_its_scheduler(fake_engine):
    """SGLang's /server_info takes milliseconds of the process that decodes."""
    fake = await fake_engine("a")
    fake.kind = "sglang"

    def asked(what: str) -> int:
        return fake.looks.count(f"GET /{what}")

    async def looked(times: int) -> None:
        until = asked("model_info") + times
        async with asyncio.timeout(30):
            while asked("model_info") < until:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async with Watch(fake, None) as watch:
        await watch.until(EngineState.SERVING)
        before = asked("server_info")
        await looked(3)
        assert asked("server_info") > before
        watch.fleet.generated(watch.record, float("inf"))
        await looked(1)
        before = asked("server_info")
        await looked(3)
        assert asked("server_info") == before
        watch.fleet.suspected(watch.record)
        async with asyncio.timeout(30):
            while asked("server_info") == before:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        watch.record.suspect = False
        watch.fleet.generated(watch.record, float("-inf"))
        before = asked("server_info")
        await looked(3)
        assert asked("server_info") > before, "it generates no more"
