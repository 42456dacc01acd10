"""Calls sent at once over one connection: replies in any pieces, and who hangs up in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from loop_clock import skip
from milepost_router.engine_api import RESUMING, EngineApi, EngineBroken, EngineRefused, naming
from milepost_router.record import EngineRecord
from milepost_router.upstream import Pool

DONE = b'{"success": true}'
NAMED, RESUMED = "/update_weight_version", "/continue_generation"


def reply(body: bytes = DONE, *, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\n{more}content-length: {len(body)}\r\n\r\n".encode() + body


CLOSES = "connection: close\r\n"
Script = list[list[bytes]]
"""What each connection writes, piece by piece, once it has read all that was asked at once."""


class Engine:
    """Answers by a script, a connection a line of it, and hangs up at the line's end, unless it stays."""

    def __init__(self, script: Script, *, stays: bool) -> None:
        self.script, self.stays = script, stays
        self.asked: list[list[str]] = []
        self.heard = asyncio.Event()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked: list[str] = []
        self.asked.append(asked)
        wanted = 2 if len(self.asked) == 1 else 1
        while len(asked) < wanted:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            asked.append(head.split()[1])
            await reader.readexactly(int(head.lower().split("content-length: ")[1].split()[0]))
        self.heard.set()
        for piece in self.script[len(self.asked) - 1]:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if self.stays:
            await reader.read()  # until the router hangs up
        writer.close()


@pytest.fixture
async def engine_of() -> AsyncIterator[Callable[..., Awaitable[tuple[Engine, EngineApi]]]]:
    """Starts engines that answer by a script, until the test ends."""
    servers: list[asyncio.Server] = []
    pool = Pool()

    async def start(
        script: Script, *, timeout_s: float = 60.0, stays: bool = False
    ) -> tuple[Engine, EngineApi]:
        engine = Engine(script, stays=stays)
        servers.append(await asyncio.start_server(engine.talk, "127.0.0.1", 0))
        port = servers[-1].sockets[0].getsockname()[1]
        record = EngineRecord(engine_id="e", url=f"http://127.0.0.1:{port}")
        return engine, EngineApi(pool, record, timeout_s=timeout_s)

    yield start
    pool.close()
    for server in servers:
        server.close()


CALLS = (naming("run/2/1"), RESUMING)
WHOLE = reply() + reply(b'{"status": "ok"}')


@pytest.mark.parametrize(
    "pieces",
    [
        [WHOLE],
        [reply(), reply(b'{"status": "ok"}')],
        [WHOLE[i : i + 1] for i in range(len(WHOLE))],
        [WHOLE[: len(reply()) + 20], WHOLE[len(reply()) + 20 :]],
    ],
    ids=["at once", "one by one", "byte by byte", "a head cut through"],
)
async def test_both_are_asked_at_once_and_answered_in_turn(engine_of, pieces: list[bytes]):
    engine, api = await engine_of([pieces])
    await api.in_turn(*CALLS)
    assert engine.asked == [[NAMED, RESUMED]]


@pytest.mark.parametrize("more", [CLOSES, ""], ids=["announced", "unannounced"])
async def test_who_hangs_up_in_between_is_asked_for_the_rest(engine_of, more: str):
    engine, api = await engine_of([[reply(more=more)], [reply()]])
    await api.in_turn(*CALLS)
    assert engine.asked == [[NAMED, RESUMED], [RESUMED]]


async def test_the_first_that_failed_is_told_of(engine_of):
    _, api = await engine_of([[reply(b'{"message": "no"}', status="400 Bad Request") + reply()]])
    with pytest.raises(EngineRefused, match=rf"e: POST {NAMED}: HTTP 400: no"):
        await api.in_turn(*CALLS)


async def test_the_second_that_failed_is_told_of(engine_of):
    _, api = await engine_of([[reply() + reply(b"boom", status="500 Internal Server Error")]])
    with pytest.raises(EngineBroken, match=rf"e: POST {RESUMED}: HTTP 500: boom"):
        await api.in_turn(*CALLS)


async def test_who_never_answers_the_rest_is_broken(engine_of):
    _, api = await engine_of([[reply()], []])
    with pytest.raises(EngineBroken, match=rf"e: POST {RESUMED}: the engine closed the connection"):
        await api.in_turn(*CALLS)


ORDER = "/update_weights_from_tensor"


def give_order(api: EngineApi, begins: Callable[[], None]) -> Awaitable[None]:
    opening = [naming("updating/t")]
    return api.receive_order(["o"], load_format="l", opening=opening, begins=begins, timeout_s=60.0)


async def test_an_order_is_told_to_begin_when_all_before_it_are_answered(engine_of):
    engine, api = await engine_of([[reply(), reply()]])
    begun = asyncio.Event()
    await give_order(api, begun.set)
    assert engine.asked == [[NAMED, ORDER]]
    assert begun.is_set()


@pytest.mark.parametrize(
    "last", [reply(), b'HTTP/1.1 200 OK\r\n\r\n{"success": true}'], ids=["whole", "ends with its connection"]
)
async def test_an_order_that_may_have_begun_is_not_given_again(engine_of, last: bytes):
    engine, api = await engine_of([[last], [reply()]])
    with pytest.raises(EngineBroken, match=rf"e: POST {ORDER}: the engine closed the connection"):
        await give_order(api, lambda: None)
    assert engine.asked == [[NAMED, ORDER]]


async def test_each_call_has_its_own_deadline_and_is_named(engine_of):
    """The order may last; what comes before it may not."""
    opening = [naming("updating/t")]
    for script, called, limit_s, gone in (([reply()], ORDER, 7200, False), ([], NAMED, 3600, True)):
        engine, api = await engine_of([script], timeout_s=3600.0, stays=True)
        begun = asyncio.Event()
        giving = asyncio.create_task(
            api.receive_order(["o"], load_format="l", opening=opening, begins=begun.set, timeout_s=7200.0)
        )
        await (begun if script else engine.heard).wait()
        skip(limit_s - 600)
        for _ in range(3):
            await asyncio.sleep(0)
        assert not giving.done()
        skip(600)
        with pytest.raises(EngineBroken, match=rf"e: POST {called}: no answer within {limit_s} s") as late:
            await giving
        assert late.value.gone == gone
