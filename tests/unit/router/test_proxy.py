"""The HTTP side over an engine whose every byte the test decides."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from raw_engine import DEADLINE_S, Exchange, RawEngine, front, hang


async def test_bytes_pass_both_ways_untouched(raw_engines):
    a, _ = raw_engines
    body = bytes(range(256)) * 1000

    async def echo(exchange: Exchange) -> None:
        await exchange.answer(exchange.body, kind="application/octet-stream", status="418 I'm a teapot")

    a.serve = echo
    async with front(a) as router, router.post("/v1/x?y=%20z", body, x_other="kept") as reply:
        assert reply.status == 418
        assert await reply.read() == body
        assert reply.headers["x-milepost-engine"] == "a"
        assert reply.headers["x-milepost-version-start"] == reply.headers["x-milepost-version-end"] == "0"
    [exchange] = a.exchanges
    assert exchange.target == "/v1/x?y=%20z"
    assert exchange.headers["x-other"] == "kept"
    assert exchange.headers["content-length"] == str(len(body))
    assert not [h for h in exchange.headers if h.startswith(("x-milepost", "connection", "transfer"))]


async def test_connections_to_engines_are_kept(raw_engines):
    a, _ = raw_engines
    async with front(a, probe_interval_s=60.0) as router:
        for _ in range(20):
            assert (await router.ask())[0] == 200
        assert a.connections <= 2  # one for the probe


@pytest.mark.parametrize("length", ["known", "chunked", "until closed"])
async def test_replies_of_every_framing_pass(raw_engines, length):
    a, _ = raw_engines

    async def answer(exchange: Exchange) -> None:
        if length == "known":
            await exchange.answer(b'{"n": 1}')
        elif length == "chunked":
            await exchange.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            await exchange.chunk(b'{"n"')
            await exchange.chunk(b": 1}")
            await exchange.send(b"0\r\n\r\n")
        else:
            await exchange.send(b'HTTP/1.1 200 OK\r\n\r\n{"n": 1}')
            exchange.writer.close()

    a.serve = answer
    async with front(a) as router:
        for _ in range(3):
            status, _, content = await router.ask()
            assert (status, content) == (200, {"n": 1})


async def test_a_stream_passes_chunk_by_chunk_and_ends_with_its_version(raw_engines):
    a, _ = raw_engines
    go_on = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start_stream()
        await exchange.chunk(b"data: 1\n\n")
        await go_on.wait()
        await exchange.chunk(b"data: [DONE]\n\n")
        await exchange.send(b"0\r\n\r\n")

    a.serve = stream
    async with front(a) as router, router.post() as reply:
        assert await reply.content.readexactly(9) == b"data: 1\n\n"
        go_on.set()
        assert await reply.content.read() == b"data: [DONE]\n\n: x-milepost-version-end: 0\n\n"


@pytest.mark.parametrize(
    ("path", "status", "tells"),
    [
        ("/generate", "200 OK", True),
        ("/v1/chat/completions", "200 OK", True),
        ("/v1/tokenize", "200 OK", False),
        ("/generate", "400 Bad Request", False),
    ],
)
async def test_replies_with_tokens_are_signs_of_life(raw_engines, path, status, tells):
    a, _ = raw_engines

    async def answer(exchange: Exchange) -> None:
        await exchange.answer(b"{}", status=status)

    a.serve = answer
    async with front(a) as router:
        [record] = router.router.fleet
        for _ in range(2):  # by a task, and on a kept connection
            record.generated_at = -1.0
            assert (await router.ask(path))[0] == int(status[:3])
            assert (record.generated_at > 0) == tells


async def test_each_chunk_of_a_stream_is_a_sign_of_life(raw_engines):
    a, _ = raw_engines
    go_on = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start_stream()
        await exchange.chunk(b"data: 1\n\n")
        await exchange.chunk(b"data: 2\n\n")
        await go_on.wait()
        await exchange.send(b"0\r\n\r\n")

    a.serve = stream
    async with front(a) as router, router.post() as reply:
        [record] = router.router.fleet
        await reply.content.readexactly(18)
        await router.until(lambda: record.generated_at > 0)
        go_on.set()
        await reply.content.read()


async def fail_before_a_byte(exchange: Exchange) -> None:
    exchange.hang_up()


async def fail_with_500(exchange: Exchange) -> None:
    await exchange.answer(b"boom", status="500 Internal Server Error", kind="text/plain")


async def fail_in_mid_body(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
    exchange.hang_up()


async def fail_before_the_first_chunk(exchange: Exchange) -> None:
    await exchange.start_stream()
    exchange.hang_up()


async def talk_rubbish(exchange: Exchange) -> None:
    await exchange.send(b"220 mail.example.com ESMTP\r\n\r\n")


FAILURES = [fail_before_a_byte, fail_with_500, fail_in_mid_body, fail_before_the_first_chunk, talk_rubbish]


@pytest.mark.parametrize("failure", FAILURES)
async def test_another_engine_answers_where_one_fails(raw_engines, failure):
    a, b = raw_engines
    a.serve = failure
    async with front(a, b) as router:
        for _ in range(6):
            status, headers, content = await router.ask()
            assert (status, headers["x-milepost-engine"], content) == (200, "b", {"engine": "b"})
        assert a.exchanges, "it was tried"


@pytest.mark.parametrize("failure", FAILURES)
async def test_where_all_fail_the_error_says_how(raw_engines, failure):
    a, b = raw_engines
    a.serve = b.serve = failure
    async with front(a, b) as router:
        async with router.post() as reply:
            raw = await reply.read()
        if failure is fail_with_500:
            assert (reply.status, raw) == (500, b"boom")
        else:
            assert reply.status == 503
            assert reply.headers["retry-after"] == "1"
            error = json.loads(raw)["error"]
            assert error["code"] == "ENGINE_FAILED"
            assert "a: " in error["message"]
            assert "b: " in error["message"]


async def test_engines_that_keep_failing_are_quarantined(raw_engines):
    a, b = raw_engines
    a.serve = fail_with_500
    async with front(a, b, request_failures=3, quarantine_s=60.0) as router:
        for _ in range(20):
            assert (await router.ask())[0] == 200
        assert router.states() == {"a": "QUARANTINED", "b": "SERVING"}
        assert len(a.exchanges) == 3


async def test_a_stream_that_breaks_off_says_so(raw_engines):
    a, b = raw_engines

    async def break_off(exchange: Exchange) -> None:
        await exchange.start_stream()
        await exchange.chunk(b"data: 1\n\n")
        exchange.hang_up()

    a.serve = b.serve = break_off
    async with front(a, b) as router, router.post() as reply:
        assert reply.status == 200
        events = (await reply.read()).decode().strip().split("\n\n")
    assert events[0] == "data: 1"
    error = json.loads(events[1].removeprefix("data: "))["error"]
    assert error["code"] == "STREAM_BROKE"
    assert len(a.exchanges) + len(b.exchanges) == 1


async def test_a_long_reply_that_breaks_off_is_not_taken_for_whole(raw_engines):
    a, _ = raw_engines

    async def break_off(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-length: 20000000\r\n\r\n" + b"x" * 10_000_000)
        exchange.hang_up()

    a.serve = break_off
    async with front(a) as router, router.post() as reply:
        assert reply.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await reply.read()


async def test_a_slow_client_slows_the_engine_and_not_the_memory(raw_engines):
    a, _ = raw_engines
    sent = 0
    stuck = asyncio.Event()

    async def flood(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.start_stream()
        exchange.writer.transport.set_write_buffer_limits(high=65536)
        try:
            for _ in range(1000):
                async with asyncio.timeout(1.0):
                    await exchange.chunk(b"x" * 262144)
                sent += 262144
        except TimeoutError:
            stuck.set()

    a.serve = flood
    async with front(a) as router, router.post() as reply:
        await reply.content.readany()
        async with asyncio.timeout(DEADLINE_S):
            await stuck.wait()
        assert sent < 40_000_000
        reply.close()


async def test_the_engine_sees_its_client_leave(raw_engines):
    a, _ = raw_engines
    left = asyncio.Event()

    async def watch(exchange: Exchange) -> None:
        await exchange.client_left()
        left.set()

    a.serve = watch
    async with front(a) as router:
        asking = asyncio.create_task(router.ask())
        await a.asked()
        asking.cancel()
        async with asyncio.timeout(DEADLINE_S):
            await left.wait()
        await router.until(lambda: all(e.in_flight == 0 for e in router.router.fleet))
        assert router.states() == {"a": "SERVING"}


async def test_a_deadline_ends_a_request_at_the_engine_too(raw_engines):
    a, _ = raw_engines
    a.serve = hang
    async with front(a) as router:
        status, _, content = await router.ask(x_milepost_deadline_ms="80")
        assert (status, content["error"]["code"]) == (504, "DEADLINE_EXCEEDED")
        assert "0.08 s" in content["error"]["message"]
        assert router.states() == {"a": "SERVING"}, "a late answer is nobody's fault"


async def test_an_engine_that_dies_hands_its_requests_over(raw_engines):
    a, b = raw_engines
    a.serve = hang
    async with front(a, b) as router:
        asking = [asyncio.create_task(router.ask(x_milepost_session=f"s{i}")) for i in range(12)]
        await a.asked()
        given = router.router.fleet.known("a")
        await router.until(lambda: len(a.exchanges) == given.in_flight)
        await a.stop()
        answers = await asyncio.gather(*asking)
        assert {(status, content["engine"]) for status, _, content in answers} == {(200, "b")}
        await router.until(lambda: router.states()["a"] == "DEAD")
        await a.start()


async def test_a_removed_engine_hands_its_requests_over(raw_engines):
    a, b = raw_engines
    a.serve = hang
    async with front(a, b) as router:
        asking = [asyncio.create_task(router.ask(x_milepost_session=f"s{i}")) for i in range(12)]
        await a.asked()
        router.router.fleet.remove("a")
        answers = await asyncio.gather(*asking)
        assert {content["engine"] for _, _, content in answers} == {"b"}


async def test_an_engine_whose_version_the_ledger_refused_hands_its_requests_over(raw_engines):
    """What it has generated of them was generated under weights that nobody may train on."""
    a, b = raw_engines
    a.serve = hang
    async with front(a, b) as router:
        asking = [asyncio.create_task(router.ask(x_milepost_session=f"s{i}")) for i in range(12)]
        await a.asked()
        refused = router.router.fleet.known("a")
        refused.version = 7
        router.router.fleet.disown("", 7, "void")
        answers = await asyncio.gather(*asking)
        assert {(status, content["engine"]) for status, _, content in answers} == {(200, "b")}
        assert refused.in_flight == 0


async def test_an_engine_that_runs_on_through_a_failing_update_hands_its_requests_over(raw_engines):
    """What it generates may be of weights that are nobody's."""
    a, b = raw_engines
    a.serve = hang
    async with front(a, b) as router:
        asking = [asyncio.create_task(router.ask(x_milepost_session=f"s{i}")) for i in range(12)]
        await a.asked()
        fleet, failing = router.router.fleet, router.router.fleet.known("a")
        fleet.begin_update(failing, now=0.0, runs_on=True)
        fleet.withdraw(failing)
        answers = await asyncio.gather(*asking)
        assert {(status, content["engine"]) for status, _, content in answers} == {(200, "b")}
        assert (failing.in_flight, router.states()["a"]) == (0, "UPDATING")


async def test_a_kept_connection_that_the_engine_closed_costs_nothing(raw_engines):
    a, _ = raw_engines

    async def once(exchange: Exchange) -> None:
        await exchange.answer(b"{}")
        exchange.hang_up()

    a.serve = once
    async with front(a, probe_interval_s=60.0) as router:
        for _ in range(10):
            assert (await router.ask())[0] == 200
        assert router.router.fleet.known("a").failures_total == 0


async def test_sessions_stay_with_their_engine(raw_engines):
    async with front(*raw_engines) as router:
        for session in range(8):
            asked = [await router.ask(x_milepost_session=str(session)) for _ in range(3)]
            assert len({content["engine"] for _, _, content in asked}) == 1
        assert all(engine.exchanges for engine in raw_engines)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x_milepost_min_version", "seven"),
        ("x_milepost_version", "-1"),
        ("x_milepost_deadline_ms", "1.5"),
        ("x_milepost_verison", "1"),
    ],
)
async def test_wrong_headers_are_named(raw_engines, header, value):
    async with front(raw_engines[0]) as router:
        status, _, content = await router.ask(**{header: value})
        assert (status, content["error"]["code"]) == (400, "BAD_HEADER")
        assert header.replace("_", "-") in content["error"]["message"]
        assert value in content["error"]["message"]


async def test_a_body_over_the_limit_is_refused_by_name(raw_engines):
    async with front(raw_engines[0], max_body_bytes=1000) as router:
        status, _, content = await router.ask(body=b"x" * 1001)
        assert status == 400
        assert "max_body_bytes" in content["error"]["message"]
        assert (await router.ask(body=b"x" * 1000))[0] == 200


async def test_only_generate_and_v1_pass(raw_engines):
    async with front(raw_engines[0]) as router:
        for path in ("/", "/flush_cache", "/generate/x", "/v1", "/v1/../health", "/v1/%2e%2e/flush_cache"):
            async with router.post(path) as reply:
                assert reply.status == 404, path
        assert raw_engines[0].exchanges == []
        async with router.session.get(router.url + "/health") as reply:
            assert await reply.json() == {"status": "ok", "serving": 1, "engines": 1}
        async with router.session.get(router.url + "/engines") as reply:
            [engine] = (await reply.json())["engines"]
            assert (engine["engine_id"], engine["state"]) == ("a", "SERVING")


async def test_a_request_waits_for_an_engine_that_is_joining():
    late = RawEngine("late")
    async with front() as router:
        await late.start()
        from milepost import types as t

        record = router.router.fleet.join(t.Engine(engine_id="late", url=late.url), now=0.0)
        assert record.state.name == "JOINING"
        status, _, content = await router.ask()
        assert (status, content) == (200, {"engine": "late"})
    await late.stop()


async def test_nobody_there_is_said_at_once():
    async with front() as router:
        status, headers, content = await router.ask(x_milepost_run="r", x_milepost_min_version="3")
        assert (status, headers["retry-after"]) == (503, "1")
        assert "run 'r', version 3 or newer" in content["error"]["message"]
