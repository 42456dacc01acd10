"""A router is killed while it takes an engine's memory or gives it back; the next one knows what to do.

router ── Line ──> engine      the line stops at one call: before the engine hears it, or once it is done
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from launched import DRIVER, Launched, free_port
from milepost.types import EngineState, Transport
from relay import CHUNK_BYTES, Relay

TAGS = ("kv_cache", "weights")
RELEASE, RESUME = b"/release_memory_occupation", b"/resume_memory_occupation"
OURS, SGLANG = b'"engine":"milepost_engine"', b'"engine":"stranger_engine"'
"""What an engine calls itself; by another name the router takes it for SGLang, and asks nothing twice."""
WHEN = pytest.mark.parametrize("heard", [False, True], ids=["before", "after"])


class Line(Relay):
    """Stops at a call; what is on its way then is lost.

    Args:
      target: `host:port` of the engine.
      renamed: the engine is to look like SGLang.

    Attributes:
      stops_at: path of the call; empty: none.
      heard: the engine gets to hear it, and only its answer is lost.
      stopped: it has.
      asked: calls for memory, as they came by.
    """

    def __init__(self, target: str, *, renamed: bool = False) -> None:
        super().__init__(target)
        self._renamed = renamed
        self.stops_at, self.heard = b"", False
        self.stopped = asyncio.Event()
        self.asked: list[bytes] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await super()._serve(reader, writer)
        except ConnectionRefusedError:  # the engine is being started again
            writer.close()

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                if not answers:
                    self.asked += [path for path in (RELEASE, RESUME) if path in data]
                if not answers and self.stops_at and self.stops_at in data:
                    self.muted, self.stops_at = True, b""
                    self.stopped.set()
                    if not self.heard:
                        continue
                if answers and self.muted:
                    continue
                sink.write(data.replace(OURS, SGLANG) if answers and self._renamed else data)
                await sink.drain()
        sink.close()


@pytest.fixture
async def line_to() -> AsyncIterator[Callable[..., Any]]:
    """Lines to engines."""
    async with AsyncExitStack() as stack:

        async def make(address: str, *, renamed: bool = False) -> Line:
            line = Line(address, renamed=renamed)
            await stack.enter_async_context(line.serving())
            return line

        yield make


@pytest.fixture
async def served(helpers, start_engine, buffer, start_router_process, publisher_of, line_to) -> Any:
    """An engine that serves behind a line, its router, and a publisher."""
    engine = start_engine()
    line = await line_to(engine.url.removeprefix("http://"))
    router = start_router_process("http://" + line.address, buffer=buffer)
    publisher = await publisher_of(router)
    await helpers.all_are(publisher.router, EngineState.STALE)
    await publisher.publish(helpers.weights(1), label=0)
    return engine, line, router, publisher


async def killed_at(
    router: Any, line: Line, call: Any, *, path: bytes, heard: bool, done: Any = None
) -> None:
    """Kills a router while one call of it is on its way, and once `done` where the engine hears it."""
    line.stops_at, line.heard = path, heard
    asking = asyncio.create_task(call)
    async with asyncio.timeout(20):
        await line.stopped.wait()
    if heard:
        await done()
    router.kill()
    asking.cancel()  # its client would go on asking
    await asyncio.gather(asking, return_exceptions=True)
    line.cut()


@WHEN
async def test_a_router_dies_while_an_engine_releases(
    helpers, served, buffer, start_router_process, publisher_of, run_id, heard
):
    engine, line, router, publisher = served

    async def gone() -> bool:
        return await helpers.released(engine.url) == sorted(TAGS)

    await killed_at(
        router,
        line,
        publisher.router.release_memory(run_id, term=publisher.term, tags=TAGS, lease_s=60),
        path=RELEASE,
        heard=heard,
        done=lambda: helpers.until("its memory is gone", gone),
    )
    heir = await publisher_of(start_router_process("http://" + line.address, buffer=buffer))

    async def adopted() -> bool:
        (found,) = (await helpers.states(heir.router)).values()
        return found.detail == "its memory is released" and await gone()

    await helpers.until("the lease stands, and its memory is gone", adopted)
    change = await heir.router.resume_memory(run_id, term=heir.term)
    assert (change.engines, change.failed) == ((line.address,), {})
    committed = await heir.publish(helpers.weights(2), label=1)
    assert committed.serving == (line.address,)
    assert (await helpers.generate(engine.url)).status == 200


async def test_a_router_is_asked_for_memory_back_before_it_has_looked(
    helpers, served, buffer, start_router_process, publisher_of, run_id
):
    """The lease would end in an hour."""
    engine, line, router, publisher = served
    await publisher.router.release_memory(run_id, term=publisher.term, tags=TAGS, lease_s=3600)
    router.kill()
    line.stops_at = b"/server_info"
    heir = await publisher_of(start_router_process("http://" + line.address, buffer=buffer))
    async with asyncio.timeout(60):
        await line.stopped.wait()
    change = await heir.router.resume_memory(run_id, term=heir.term)
    assert (change.engines, change.failed) == ((), {})
    assert await helpers.released(engine.url) == sorted(TAGS)
    line.cut()
    await helpers.all_are(heir.router, EngineState.STALE)
    assert await helpers.released(engine.url) == []
    committed = await heir.publish(helpers.weights(2), label=1)
    assert committed.serving == (line.address,)


async def test_a_router_stops_while_it_waits_for_requests_to_end(helpers, served, run_id):
    """No engine is asked for memory back that it has not given up: SGLang would die of it."""
    engine, line, router, publisher = served
    generating = asyncio.create_task(helpers.generate(router.http, tokens=60_000))

    async def state() -> Any:
        (found,) = (await helpers.states(publisher.router)).values()
        return found.state if found.in_flight else None

    async def generates() -> bool:
        return await state() is EngineState.SERVING

    async def drains() -> bool:
        return await state() is EngineState.UPDATING

    await helpers.until("the engine generates", generates)
    releasing = asyncio.create_task(
        publisher.router.release_memory(
            run_id, term=publisher.term, tags=("kv_cache",), drain_s=600, lease_s=3600
        )
    )
    await helpers.until("its request has the time to end", drains)
    assert await asyncio.to_thread(router.stop) == 0
    releasing.cancel()
    generating.cancel()
    await asyncio.gather(releasing, generating, return_exceptions=True)
    assert line.asked in ([], [RELEASE, RESUME])
    assert await helpers.released(engine.url) == []
    assert (await helpers.generate(engine.url)).status == 200


@WHEN
async def test_a_router_dies_while_an_engine_takes_its_memory_back(
    helpers, served, buffer, start_router_process, publisher_of, run_id, heard
):
    engine, line, router, publisher = served

    async def back() -> bool:
        return await helpers.released(engine.url) == []

    await publisher.router.release_memory(run_id, term=publisher.term, tags=TAGS, lease_s=60)
    assert await helpers.released(engine.url) == sorted(TAGS)
    await killed_at(
        router,
        line,
        publisher.router.resume_memory(run_id, term=publisher.term),
        path=RESUME,
        heard=heard,
        done=lambda: helpers.until("its memory is back", back),
    )
    heir = await publisher_of(start_router_process("http://" + line.address, buffer=buffer))
    await helpers.all_are(heir.router, EngineState.STALE)
    assert await back()
    committed = await heir.publish(helpers.weights(2), label=1)
    assert committed.serving == (line.address,)
    assert (await helpers.generate(engine.url)).status == 200


@pytest.mark.timeout(240)
@WHEN
async def test_one_that_cannot_say_what_it_has_is_started_again(
    helpers,
    model_dir: Path,
    tmp_path: Path,
    buffer,
    start_router_process,
    publisher_of,
    line_to,
    run_id,
    heard,
):
    """As SGLang, which dies of a second release and of a second resume."""
    port, at = free_port(), f"127.0.0.1:{free_port()}"
    line = await line_to(f"127.0.0.1:{port}", renamed=True)
    flags = ("--engine-id", "e", "--router", at, "--advertise", "http://" + line.address, "--run_id", run_id)
    argv = ("-c", DRIVER, port, "--model", str(model_dir), "--port", port, *flags)
    launched = Launched(tmp_path / "engine.log", *argv)
    try:
        assert "ready" in launched.ready(), launched.log.read_text()[-3000:]
        before = launched.server()
        router = start_router_process(buffer=buffer, listen=at)
        publisher = await publisher_of(router)
        await helpers.all_are(publisher.router, EngineState.STALE)
        await publisher.publish(helpers.weights(1), label=0, transport=Transport.DISK)
        was = (await helpers.states(publisher.router))["e"].instance_id

        async def gone() -> bool:
            return await helpers.released(f"http://127.0.0.1:{port}") == sorted(TAGS)

        release = publisher.router.release_memory(run_id, term=publisher.term, tags=TAGS, lease_s=60)
        await killed_at(
            router,
            line,
            release,
            path=RELEASE,
            heard=heard,
            done=lambda: helpers.until("its memory is gone", gone),
        )
        heir = await publisher_of(start_router_process(buffer=buffer, listen=at))

        async def another() -> bool:
            engine = (await helpers.states(heir.router)).get("e")
            return engine is not None and engine.state is EngineState.STALE and engine.instance_id != was

        await helpers.until("another server is known", another, within_s=120)
        assert launched.server() != before
        committed = await heir.publish(helpers.weights(2), label=1, transport=Transport.DISK)
        assert committed.serving == ("e",)
    finally:
        launched.end()
