"""A hand-written engine and a hand-written ledger, both driven by what the test tells them.

The router's deadlines are short for calls that hang, and long for those that will be answered (`PatientApi`):
a machine that stands still for a moment makes no engine fail that the test did not tell to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import web

from milepost import errors
from milepost import types as t
from milepost_router.engine_api import Call, EngineApi
from milepost_router.fleet import Fleet, FleetLimits
from milepost_router.ledger import Publication, RouterHeld
from milepost_router.record import EngineRecord
from milepost_router.settings import RouterSettings
from milepost_router.transactions import Transactions
from milepost_router.upstream import Pool
from raw_engine import RawEngine

DEADLINE_S = 30.0
PATIENCE_S = 60.0
Reaction = Callable[[web.Request, Any], Awaitable[web.StreamResponse | None]]


class FakeEngine:
    """SGLang's admin surface with nothing behind it.

    Attributes:
      calls: paths in the order in which they came, without the probes.
      bodies: what came with them.
      looks: method and path of everything else.
      info: more for /server_info.
      reactions: by path, what to do instead of answering well; None answers well after all.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = ""
        self.version_string = "default"
        self.checksum = "same"
        self.release = "0.5.21"
        self.kind = "milepost_engine"
        self.info: dict[str, Any] = {}
        self.looks: list[str] = []
        self.paused = False
        self.calls: list[str] = []
        self.bodies: dict[str, list[Any]] = {}
        self.keys: set[str | None] = set()
        self.reactions: dict[str, Reaction] = {}
        self._hanging: dict[str, tuple[Reaction, float | None]] = {}
        self.happened = asyncio.Condition()
        self._released = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listens."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._on_request)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Goes away; connections break."""
        self._released.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def called(self, path: str) -> None:
        """Waits until `path` was asked for."""
        async with asyncio.timeout(DEADLINE_S), self.happened:
            await self.happened.wait_for(lambda: path in self.calls)

    def refuse(self, path: str, message: str = "no") -> None:
        """Answers 400 from now on."""

        async def react(request: web.Request, body: Any) -> web.Response:
            return web.json_response({"success": False, "message": message}, status=400)

        self.reactions[path] = react

    def break_down(self, path: str) -> None:
        """Answers 500 from now on."""

        async def react(request: web.Request, body: Any) -> web.Response:
            return web.Response(status=500, text="boom")

        self.reactions[path] = react

    def talk_rubbish(self, path: str) -> None:
        """Answers something that is no JSON object."""

        async def react(request: web.Request, body: Any) -> web.Response:
            return web.Response(text="[]]")

        self.reactions[path] = react

    def hang(self, path: str, *, deadline_s: float | None = None) -> None:
        """Never answers; None: the deadline of such a call is the router's own."""

        async def react(request: web.Request, body: Any) -> None:
            await self._released.wait()

        self.reactions[path] = react
        self._hanging[path] = react, deadline_s

    def deadline_s(self, path: str) -> float | None:
        """How long the router waits for a call to it; None: as long as it wants to."""
        reaction, deadline_s = self._hanging.get(path, (None, None))
        hangs = reaction is not None and reaction is self.reactions.get(path)
        return deadline_s if hangs else PATIENCE_S

    def api(self, pool: Pool, record: EngineRecord, *, timeout_s: float) -> EngineApi:
        """The router's client of it; `timeout_s` is for calls that hang."""
        return PatientApi(self, pool, record, timeout_s=timeout_s)

    def hang_up(self, path: str) -> None:
        """Closes the connection instead of answering."""

        async def react(request: web.Request, body: Any) -> web.Response:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        self.reactions[path] = react

    async def _on_request(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.keys.add(request.headers.get("authorization"))
        body = await request.json() if request.can_read_body else None
        if request.method != "POST":
            self.looks.append(f"{request.method} {path}")
        else:
            async with self.happened:
                self.calls.append(path.removeprefix("/"))
                self.bodies.setdefault(path.removeprefix("/"), []).append(body)
                self.happened.notify_all()
        reaction = self.reactions.get(path.removeprefix("/"))
        if reaction is not None:
            answer = await reaction(request, body)
            if answer is not None:
                return answer
        return self._answer(path, body)

    def _answer(self, path: str, body: Any) -> web.Response:
        if path == "/update_weight_version":
            self.version_string = body["new_version"]
        elif path == "/pause_generation":
            self.paused = True
        elif path == "/continue_generation":
            self.paused = False
        elif path == "/model_info":
            return web.json_response({"weight_version": self.version_string})
        elif path == "/server_info":
            return web.json_response({"engine": self.kind, "version": self.release, "tp_size": 1} | self.info)
        elif path == "/weights_checker":
            return web.json_response({"success": True, "ranks": [{"per_gpu_checksum": self.checksum}]})
        return web.json_response({"success": True, "message": "done"})


class PatientApi(EngineApi):
    """Waits for an answer that will come, however late; a call that hangs has the router's deadline."""

    def __init__(self, fake: FakeEngine, pool: Pool, record: EngineRecord, *, timeout_s: float) -> None:
        super().__init__(pool, record, timeout_s=timeout_s)
        self._fake = fake

    async def _ask(
        self, *calls: Call, timeout_s: float | None = None, **more: Any
    ) -> list[tuple[int, bytes]]:
        limits = [self._fake.deadline_s(path.removeprefix("/")) for _, path, _ in calls]
        patience = [limit for limit in limits if limit is not None]
        if len(patience) < len(limits):
            return await super()._ask(*calls, timeout_s=timeout_s, **more)
        deadline_s = min(patience)
        patient = EngineApi(self._pool, self._record, timeout_s=deadline_s)
        return await patient._ask(*calls, timeout_s=timeout_s and deadline_s, **more)


class FakeLedger:
    """Numbers and labels, as far as a transaction asks for them."""

    def __init__(self) -> None:
        self.published: list[Publication] = []
        self.reserved: dict[tuple[int, int, int], int] = {}
        self.next_version = 1
        self.leases = 0
        self.away = False
        self.refusal: errors.MilepostError | None = None
        self.held_by_another = False

    async def lease(self, run_id: str) -> None:
        """Claims the run."""
        self.leases += 1
        if self.held_by_another:
            raise RouterHeld("another router has it")

    async def reserve(self, run_id: str, *, term: int, step: int, attempt: int, at_least: int) -> int:
        """A number."""
        key = (term, step, attempt)
        if key not in self.reserved:
            self.reserved[key] = max(self.next_version, at_least)
            self.next_version = self.reserved[key] + 1
        return self.reserved[key]

    async def check_published(self, run_id: str, version: int, label: int) -> None:
        """It is published."""
        if not any(p.version == version and p.label == label for p in self.published):
            raise errors.FailedPrecondition(f"version = {version} is not published with label {label}")

    async def publish(self, publication: Publication) -> bool:
        """Publishes, unless told otherwise."""
        if self.refusal is not None:
            raise self.refusal
        if self.away:
            return False
        self.published.append(publication)
        return True

    async def restate(self, publication: Publication) -> None:
        """Publishes what it does not know."""
        if self.refusal is not None:
            raise self.refusal
        if not any(p.version == publication.version for p in self.published):
            self.published.append(publication)


class Bench:
    """Transactions over fake engines.

    Args:
      settings: of the router; their `engine_call_timeout_s` is also what stragglers of a collective get.
      call_timeout_s: of an admin call that hangs; None: as in the settings.

    Attributes:
      fleet, transactions, ledger: what is tested, and the ledger it talks to.
      engines: the fakes by name.
    """

    def __init__(self, settings: RouterSettings, *, call_timeout_s: float | None = None) -> None:
        limits = FleetLimits(quarantine_s=0.0)
        self.fleet = Fleet(limits=limits)
        self.pool = Pool(connect_timeout_s=PATIENCE_S)
        self.ledger = FakeLedger()
        self.engines: dict[str, FakeEngine] = {}
        ledger: Any = self.ledger
        self.transactions = Transactions(self.fleet, self._api, ledger=ledger, settings=settings)
        self._call_timeout_s = call_timeout_s or settings.engine_call_timeout_s

    def _api(self, record: EngineRecord) -> EngineApi:
        return self.engines[record.engine_id].api(self.pool, record, timeout_s=self._call_timeout_s)

    def record(self, name: str) -> EngineRecord:
        """What the fleet knows of an engine."""
        return self.fleet.known(name)

    def states(self) -> dict[str, str]:
        """States by name."""
        return {e.engine_id: e.state.name for e in self.fleet.of_run("")}

    def join(self, fake: FakeEngine, **capabilities: Any) -> EngineRecord:
        """Adds an engine, probed and STALE."""
        newest = {
            "engine": "milepost 0.5.21",
            "update_session": True,
            "version_spans": True,
            "checksum": True,
        }
        able: dict[str, Any] = newest | capabilities
        engine = t.Engine(
            engine_id=fake.name, url=fake.url, capabilities=t.EngineCapabilities(**able), instance_id="i"
        )
        record = self.fleet.join(engine, now=0.0)
        self.fleet.probe_ok(record, fake.version_string, generation=record.generation, now=0.0)
        self.engines[fake.name] = fake
        return record


TENSORS = tuple(t.TensorSpec(name=f"w{i}", dtype="float32", shape=(2,)) for i in range(2))


class HeldLedger:
    """Holds publications back until `answer`; what else is asked goes to the bench's ledger."""

    def __init__(self, bench: Any) -> None:
        self._publish = bench.ledger.publish
        self._may = asyncio.Event()
        self.asked = asyncio.Event()
        bench.ledger.publish = self.publish

    async def publish(self, publication: Publication) -> bool:
        """Publishes once it may."""
        self.asked.set()
        await self._may.wait()
        return await self._publish(publication)

    def answer(self) -> None:
        """From now on it may."""
        self._may.set()


def request(**changes: Any) -> t.PrepareRequest:
    """A preparation of two tensors through shared memory."""
    given: dict[str, Any] = {
        "run_id": "run",
        "term": 1,
        "label": 0,
        "attempt": 1,
        "manifest": TENSORS,
        "transport": t.Transport.SHM,
        "timeout_s": PATIENCE_S,
    }
    return t.PrepareRequest(**(given | changes))


def bucket(prepared: t.Prepared, index: int, *, transport: t.Transport = t.Transport.SHM) -> t.BucketHeader:
    """One bucket with one tensor."""
    handles = (t.HandlesOfEngine(handles=(b'{"kind": "shm"}',)),)
    return t.BucketHeader(
        transaction_id=prepared.transaction_id,
        fleet_epoch=prepared.fleet_epoch,
        bucket_index=index,
        tensors=(TENSORS[index],),
        handles=() if transport in (t.Transport.GLOO, t.Transport.NCCL) else handles,
        size_bytes=8,
    )


async def transfer(
    bench: Bench, prepared: t.Prepared, *, transport: Any = t.Transport.SHM
) -> list[t.BucketAck]:
    """Both buckets."""
    transaction = bench.transactions.find(prepared.transaction_id)
    return [await transaction.take(bucket(prepared, i, transport=transport)) for i in range(2)]


async def commit(bench: Bench, prepared: t.Prepared, *, num_buckets: int = 2) -> t.Committed:
    """Commits."""
    return await bench.transactions.commit(
        prepared.transaction_id, fleet_epoch=prepared.fleet_epoch, term=1, num_buckets=num_buckets
    )


async def until(check: Callable[[], bool]) -> None:
    """Lets others run until something holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not check():  # noqa: ASYNC110 (what is awaited has no event of its own)
            await asyncio.sleep(0.005)


class Tools:
    """Functions of this file for tests, which cannot import it."""

    @staticmethod
    def bench(*, call_timeout_s: float | None = None, **changes: Any) -> Bench:
        """Transactions under other settings."""
        return Bench(RouterSettings(**changes), call_timeout_s=call_timeout_s)

    request = staticmethod(request)
    bucket = staticmethod(bucket)
    transfer = staticmethod(transfer)
    commit = staticmethod(commit)
    until = staticmethod(until)
    tensors = TENSORS
    HeldLedger = HeldLedger


@pytest.fixture
def tools() -> type[Tools]:
    """The functions."""
    return Tools


@pytest.fixture
async def fake_engine() -> AsyncIterator[Callable[[str], Awaitable[FakeEngine]]]:
    """Starts fake engines."""
    async with AsyncExitStack() as stack:

        async def start(name: str) -> FakeEngine:
            fake = FakeEngine(name)
            await fake.start()
            stack.push_async_callback(fake.stop)
            return fake

        yield start


@pytest.fixture
async def bench(fake_engine: Any) -> AsyncIterator[Bench]:
    """Two engines, STALE, and a ledger."""
    made = Bench(RouterSettings(bucket_timeout_s=0.5, commit_wait_s=0.3), call_timeout_s=0.5)
    for name in ("a", "b"):
        made.join(await fake_engine(name))
    yield made
    await made.transactions.close()
    made.pool.close()


@pytest.fixture
async def raw_engines() -> AsyncIterator[list[RawEngine]]:
    """Two engines, "a" and "b"."""
    engines = [RawEngine("a"), RawEngine("b")]
    for engine in engines:
        await engine.start()
    yield engines
    for engine in engines:
        await engine.stop()
