"""Publication as a level: who is given weights, when, under which number, and what a failure leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from milepost import types as t
from milepost.errors import NotFound, StaleTerm, Unavailable
from milepost_trainer import publisher as publisher_module
from milepost_trainer.buckets import Bucket, plan_buckets
from milepost_trainer.publisher import Published, Publisher
from milepost_trainer.settings import PublishSettings
from milepost_trainer.transports.base import WeightTransport

BUCKETS = plan_buckets([("a", "uint8", (4,)), ("b", "uint8", (4,))], bucket_bytes=4)


class FakeRouter:
    """A fleet that does as it is told, or fails in a chosen place."""

    def __init__(self) -> None:
        self.fleets: asyncio.Queue[t.Fleet] = asyncio.Queue()
        self.requests: list[t.PrepareRequest] = []
        self.got: list[t.BucketHeader] = []
        self.committed: list[int] = []
        self.aborted: list[str] = []
        self.engines: dict[str, t.Engine] = {}
        self.fail_at = ""
        self.hang_at = ""
        self.hanging, self.ahead = asyncio.Event(), asyncio.Event()
        self.next_version = 1
        self.most: int | None = None  # members of a transaction; None: all who lack weights
        self.members: tuple[str, ...] = ()

    def set_engine(self, name: str, state: t.EngineState, label: int = 0) -> None:
        self.engines[name] = t.Engine(engine_id=name, url="", run_id="run", state=state, weight_label=label)
        self.tell()

    def tell(self) -> None:
        fleet = t.Fleet(engines=tuple(self.engines.values()), fleet_epoch=len(self.engines))
        self.fleets.put_nowait(fleet)

    async def watch_fleet(self, run_id: str) -> AsyncIterator[t.Fleet]:
        while True:
            yield await self.fleets.get()

    async def _at(self, place: str) -> None:
        if self.hang_at == place:
            self.hanging.set()
            await asyncio.Event().wait()
        if self.fail_at == place:
            raise Unavailable(f"{place} failed")
        if self.fail_at == f"unknown {place}":
            raise NotFound("no such version")
        if self.fail_at == f"stale {place}":
            raise StaleTerm("replaced")

    async def prepare_weights(self, request: t.PrepareRequest) -> t.Prepared:
        self.requests.append(request)
        if request.label:
            self.ahead.set()
        await self._at("prepare")
        serving = t.EngineState.SERVING
        lacking = [
            e for e in self.engines.values() if e.state is not serving or e.weight_label != request.label
        ]
        self.members = tuple(e.engine_id for e in lacking)[: self.most]
        version = request.version or self.next_version
        self.next_version = max(self.next_version, version + 1)
        return t.Prepared(
            transaction_id=f"t{len(self.requests)}",
            version=version,
            fleet_epoch=5,
            members=tuple(t.WeightMember(engine_id=name) for name in self.members),
        )

    async def update_weights(
        self, buckets: AsyncIterable[t.BucketHeader], *, timeout_s: float
    ) -> AsyncIterator[t.BucketAck]:
        async for header in buckets:
            await self._at("update")
            self.got.append(header)
            ok = self.fail_at != "refuse"
            yield t.BucketAck(
                bucket_index=header.bucket_index,
                acks=(t.EngineAck(engine_id="e", ok=ok, message="no"),),
                group_broken=self.fail_at == "break",
            )

    async def commit_weights(self, transaction_id: str, *, num_buckets: int, **_: Any) -> t.Committed:
        await self._at("commit")
        request = self.requests[-1]
        version = request.version or self.next_version - 1
        self.committed.append(version)
        assert num_buckets == (1 if self.got[-1].whole else len(BUCKETS))
        for name in self.members:
            self.engines[name] = replace(
                self.engines[name],
                state=t.EngineState.SERVING,
                weight_version=version,
                weight_label=request.label,
            )
        self.tell()
        await self._at("answer to the commit")
        return t.Committed(version=version, serving=self.members, published=True)

    async def release_memory(self, run_id: str, **_: Any) -> t.MemoryChange:
        for name in self.engines:
            self.set_engine(name, t.EngineState.UPDATING)
        return t.MemoryChange(engines=tuple(self.engines))

    async def resume_memory(self, run_id: str, *, term: int) -> t.MemoryChange:
        await self._at("resume")
        for name in self.engines:
            self.set_engine(name, t.EngineState.STALE)
        return t.MemoryChange(engines=tuple(self.engines))

    async def list_engines(self, run_id: str) -> t.Fleet:
        return t.Fleet(engines=tuple(self.engines.values()), fleet_epoch=len(self.engines))

    async def abort_weights(self, transaction_id: str, **_: Any) -> tuple[str, ...]:
        self.aborted.append(transaction_id)
        return ()


class FakeTransport(WeightTransport):
    """Remembers what it was asked."""

    kind = t.Transport.SHM

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.staged: set[int] = set()
        self.closed: list[bool] = []
        self.can_share = False
        self.shared: list[list[str]] = []
        self.took: list[set[str]] = []

    def shares(self, prepared: t.Prepared) -> bool:
        return self.can_share

    async def share(
        self, prepared: t.Prepared, manifest: Sequence[t.TensorSpec], weights: Mapping[str, torch.Tensor]
    ) -> tuple[t.HandlesOfEngine, ...]:
        self.shared.append([spec.name for spec in manifest if spec.name in weights])
        return (t.HandlesOfEngine(engine_id="e", handles=(b"order",), load_format="hook"),)

    def taken(self, engine_ids: Collection[str]) -> None:
        self.took.append(set(engine_ids))

    async def open(self, prepared: t.Prepared, *, timeout_s: float) -> None:
        pass

    async def stage(self, bucket: Bucket, flat: torch.Tensor) -> tuple[t.HandlesOfEngine, ...]:
        self.staged.add(bucket.index)
        return (t.HandlesOfEngine(handles=(b"handle",)),)

    async def send(self, bucket: Bucket, flat: torch.Tensor, *, timeout_s: float) -> None:
        self.sent.append(bytes(flat.tolist()))

    async def unstage(self, bucket: Bucket) -> None:
        self.staged.remove(bucket.index)

    async def close(self, *, broken: bool) -> None:
        self.closed.append(broken)
        self.staged.clear()


class Bench:
    """A publisher between a fake fleet and a fake transport."""

    def __init__(self, settings: PublishSettings | None = None) -> None:
        self.router, self.transport = FakeRouter(), FakeTransport()
        self.publisher = Publisher(
            self.router,  # type: ignore[arg-type]
            transport=self.transport,
            buckets=BUCKETS,
            gather=self.gather,
            whole=self.whole,
            settings=settings or PublishSettings(timeout_s=60, retry_delay_s=60),
            run_id="run",
        )

    async def whole(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(4, dtype=torch.uint8) for name in ("a", "b")}

    async def gather(self, bucket: Bucket) -> torch.Tensor:
        return torch.full((4,), bucket.index, dtype=torch.uint8)

    async def heard(self) -> None:
        """Wait until the publisher has seen all that the fleet said."""
        while not self.router.fleets.empty():
            self.publisher.changed.clear()
            await self.publisher.changed.wait()


@pytest.fixture
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    """A publisher that watches; the parameter, if any: what memory engines lend."""
    lent: tuple[str, ...] = getattr(request, "param", ())
    made = Bench(PublishSettings(timeout_s=60, retry_delay_s=60, release_memory=lent))
    made.publisher.start(term=9, label=0, published=Published())
    watching = asyncio.create_task(made.publisher.watch())
    yield made
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_nobody_there_nothing_to_do(bench: Bench) -> None:
    assert not bench.publisher.wanted
    assert not await bench.publisher.catch_up()
    assert bench.router.requests == []


async def test_the_first_weights_go_to_whoever_is_stale(bench: Bench) -> None:
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    assert await bench.publisher.catch_up()
    (request,) = bench.router.requests
    assert (request.term, request.label, request.attempt, request.version) == (9, 0, 1, 0)
    assert [spec.name for spec in request.manifest] == ["a", "b"]
    assert [header.bucket_index for header in bench.router.got] == [0, 1]
    assert bench.router.got[0].handles[0].handles == (b"handle",)
    assert bench.transport.sent == [b"\0\0\0\0", b"\1\1\1\1"]
    assert bench.transport.closed == [False]
    assert bench.publisher.published == Published(version=1, label=0)
    await bench.heard()
    assert not bench.publisher.wanted


async def test_a_step_is_published_under_a_new_number(bench: Bench) -> None:
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    await bench.publisher.catch_up()
    await bench.heard()
    bench.publisher.moved_to(1, due=True)
    assert bench.publisher.wanted
    await bench.publisher.catch_up()
    assert bench.publisher.published == Published(version=2, label=1)


async def test_a_late_engine_gets_the_published_version(bench: Bench) -> None:
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    await bench.publisher.catch_up()
    bench.router.set_engine("late", t.EngineState.STALE)
    await bench.heard()
    assert await bench.publisher.catch_up()
    assert (bench.router.requests[1].version, bench.router.requests[1].attempt) == (1, 2)
    assert bench.publisher.published == Published(version=1, label=0)


async def test_engines_that_are_left_out_get_the_same_version_right_after(bench: Bench) -> None:
    bench.router.set_engine("e", t.EngineState.STALE)
    bench.router.set_engine("loner", t.EngineState.STALE)
    await bench.heard()
    bench.router.most = 1
    assert await bench.publisher.catch_up()
    assert [(r.label, r.version) for r in bench.router.requests] == [(0, 0), (0, 1)]
    assert {e.weight_version for e in bench.router.engines.values()} == {1}


async def test_weights_between_publications_need_a_number_of_their_own(bench: Bench) -> None:
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    await bench.publisher.catch_up()
    await bench.heard()
    bench.publisher.moved_to(1, due=False)
    assert not bench.publisher.wanted
    bench.router.set_engine("late", t.EngineState.STALE)
    await bench.heard()
    await bench.publisher.catch_up()
    assert (bench.router.requests[1].version, bench.router.requests[1].label) == (0, 1)


async def test_replay_below_what_was_published_is_silent(bench: Bench) -> None:
    bench.publisher.start(term=10, label=3, published=Published(version=6, label=5))
    bench.router.set_engine("serving", t.EngineState.SERVING, 5)
    bench.router.set_engine("stale", t.EngineState.STALE)
    await bench.heard()
    assert not bench.publisher.wanted
    bench.publisher.moved_to(4, due=True)
    assert not bench.publisher.wanted
    bench.publisher.moved_to(5, due=True)
    assert bench.publisher.wanted
    await bench.publisher.catch_up()
    # Weights trained again are not the version that was published before the crash.
    assert (bench.router.requests[0].version, bench.router.requests[0].label) == (0, 5)


async def test_where_no_engine_serves_any_more_a_replay_is_published(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "_UNSERVED_S", 3600.0)
    bench.publisher.start(term=10, label=3, published=Published(version=6, label=5))
    bench.router.set_engine("a", t.EngineState.STALE)
    bench.router.set_engine("b", t.EngineState.STALE)
    await bench.heard()
    assert not bench.publisher.wanted  # others may show up yet
    assert 0 < bench.publisher.retry_in_s <= 3600
    bench.router.set_engine("c", t.EngineState.JOINING)
    await bench.heard()
    monkeypatch.setattr(publisher_module, "_UNSERVED_S", 0.0)
    assert not bench.publisher.wanted  # this one may serve version 6
    bench.router.set_engine("c", t.EngineState.QUARANTINED)
    await bench.heard()
    assert bench.publisher.wanted
    assert await bench.publisher.catch_up()
    assert bench.publisher.published.label == 3
    await bench.heard()
    assert not bench.publisher.wanted
    bench.publisher.moved_to(4, due=True)  # the floor is gone: nothing newer is served
    assert await bench.publisher.catch_up()
    assert [(r.version, r.label) for r in bench.router.requests] == [(0, 3), (0, 4)]


@pytest.mark.parametrize("place", ["prepare", "update", "refuse", "break", "commit"])
async def test_a_failure_is_aborted_and_tried_again_later(bench: Bench, place: str) -> None:
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    bench.router.fail_at = place
    assert not await bench.publisher.catch_up()
    assert not bench.publisher.wanted
    assert bench.publisher.lacking
    assert 0 < bench.publisher.retry_in_s <= 60
    opened = place != "prepare"
    assert bench.router.aborted == (["t1"] if opened else [])
    assert bench.transport.closed == ([True] if opened else [])
    assert bench.transport.staged == set()
    assert bench.publisher.published.label is None
    bench.router.fail_at = ""
    bench.publisher.moved_to(1, due=True)  # new weights do not wait for the old delay
    assert await bench.publisher.catch_up()
    assert bench.publisher.published.label == 1


async def test_the_delay_between_failures_has_an_end() -> None:
    bench = Bench(PublishSettings(timeout_s=60, retry_delay_s=0.001, max_retry_delay_s=0.004))
    bench.publisher.start(term=9, label=0, published=Published())
    watching = asyncio.create_task(bench.publisher.watch())
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    bench.router.fail_at = "prepare"
    for _ in range(12):  # doubled twelve times it would be four seconds
        await asyncio.sleep(bench.publisher.retry_in_s)
        assert not await bench.publisher.catch_up()
        assert bench.publisher.retry_in_s <= 0.004
    assert len(bench.router.requests) == 12
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_change_of_the_fleet_ends_the_delay(bench: Bench) -> None:
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    bench.router.fail_at = "commit"
    await bench.publisher.catch_up()
    bench.router.fail_at = ""
    bench.router.set_engine("other", t.EngineState.STALE)
    await bench.heard()
    assert bench.publisher.wanted
    assert await bench.publisher.catch_up()
    assert bench.router.requests[-1].attempt == 2


async def test_a_commit_whose_answer_was_lost_is_learnt_from_the_fleet(bench: Bench) -> None:
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    bench.router.fail_at = "answer to the commit"
    assert not await bench.publisher.catch_up()
    bench.router.fail_at = ""
    bench.router.set_engine("other", t.EngineState.SERVING, 0)
    await bench.heard()
    assert bench.publisher.wanted
    assert not await bench.publisher.catch_up()
    assert bench.publisher.published == Published(version=1, label=0)
    assert not bench.publisher.lacking


async def test_what_redis_forgot_is_published_again(bench: Bench) -> None:
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    await bench.publisher.catch_up()
    bench.publisher.moved_to(1, due=True)
    await bench.publisher.catch_up()
    await bench.heard()
    bench.publisher.forgotten(Published(version=2, label=1))
    assert not bench.publisher.lacking
    bench.publisher.forgotten(Published(version=1, label=0))
    assert bench.publisher.wanted
    assert not await bench.publisher.catch_up(), "the router tells the ledger; engines have it already"
    assert (bench.router.requests[-1].label, bench.router.requests[-1].version) == (1, 0)
    assert bench.publisher.published == Published(version=2, label=1)
    assert not bench.publisher.lacking


async def test_a_version_that_the_ledger_lost_is_not_asked_for_for_ever(bench: Bench) -> None:
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    await bench.publisher.catch_up()
    bench.router.set_engine("late", t.EngineState.STALE)
    await bench.heard()
    bench.router.fail_at = "unknown prepare"
    assert not await bench.publisher.catch_up()
    bench.router.fail_at = ""
    bench.router.set_engine("later", t.EngineState.STALE)  # ends the delay
    await bench.heard()
    assert await bench.publisher.catch_up()
    assert [r.version for r in bench.router.requests] == [0, 1, 0]


async def test_a_bucket_that_is_refused_is_not_waited_for(bench: Bench) -> None:
    async def send(bucket: Bucket, flat: torch.Tensor, *, timeout_s: float) -> None:
        await asyncio.Event().wait()

    bench.transport.send = send  # type: ignore[method-assign]
    bench.publisher._settings = PublishSettings(timeout_s=3600)  # pyright: ignore[reportPrivateUsage]
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    bench.router.fail_at = "break"
    async with asyncio.timeout(30):
        assert not await bench.publisher.catch_up()
    assert bench.transport.closed == [True]


@pytest.mark.parametrize("place", ["prepare", "update", "commit"])
async def test_cancelling_cleans_up(bench: Bench, place: str) -> None:
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    bench.router.hang_at = place
    task = asyncio.create_task(bench.publisher.catch_up())
    await bench.router.hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.transport.staged == set()
    assert len(bench.router.aborted) == len(bench.transport.closed) == (place != "prepare")


async def test_a_newer_trainer_is_fatal(bench: Bench) -> None:
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    bench.router.fail_at = "stale prepare"
    with pytest.raises(StaleTerm):
        await bench.publisher.catch_up()


async def test_engines_of_other_runs_are_not_ours(bench: Bench) -> None:
    engine = t.Engine(engine_id="x", url="", run_id="other", state=t.EngineState.STALE)
    bench.router.engines["x"] = engine
    bench.router.tell()
    await bench.heard()
    assert not bench.publisher.wanted


async def test_weights_are_shared_where_they_lie_with_members_that_copy_them(bench: Bench) -> None:
    bench.transport.can_share = True
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    assert await bench.publisher.catch_up()
    (header,) = bench.router.got
    assert (header.whole, header.tensors, header.bucket_index) == (True, (), 0)
    assert header.handles[0].load_format == "hook"
    assert header.size_bytes == sum(bucket.size_bytes for bucket in BUCKETS)
    assert bench.transport.shared == [["a", "b"]]
    assert bench.transport.took == [{"e"}]
    assert bench.transport.sent == []


async def test_whoever_does_not_copy_what_was_shared_has_not_taken_it(bench: Bench) -> None:
    bench.transport.can_share = True
    bench.router.fail_at = "refuse"
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    assert not await bench.publisher.catch_up()
    assert bench.transport.took == [set()]
    assert bench.transport.closed == [True]
    assert bench.router.aborted == ["t1"]


async def published_once(bench: Bench) -> None:
    """An engine serves label 0."""
    bench.transport.prepares_ahead = True
    bench.router.set_engine("e", t.EngineState.STALE)
    await bench.heard()
    assert await bench.publisher.catch_up()
    await bench.heard()


async def test_a_transaction_is_prepared_while_the_step_still_makes_its_weights(bench: Bench) -> None:
    await published_once(bench)
    finish = asyncio.Event()
    making = asyncio.create_task(bench.publisher.while_made(1, finish.wait()))
    async with asyncio.timeout(30):
        await bench.router.ahead.wait()
    assert not making.done()
    assert bench.router.requests[-1].label == 1
    assert len(bench.router.got) == len(BUCKETS), "no byte before the weights are there"
    finish.set()
    assert await making is True
    bench.publisher.moved_to(1, due=True)
    assert await bench.publisher.catch_up()
    assert len(bench.router.requests) == 2
    assert bench.router.got[-1].transaction_id == "t2"
    assert bench.publisher.published.label == 1


@pytest.mark.parametrize("fails", ["prepare", "hang"])
async def test_a_router_that_is_away_holds_no_step_up(
    bench: Bench, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "_AHEAD_S", 0.05)
    await published_once(bench)
    bench.router.fail_at, bench.router.hang_at = ("prepare", "") if fails == "prepare" else ("", "prepare")
    assert await bench.publisher.while_made(1, asyncio.sleep(0, "made")) == "made"
    bench.router.fail_at = bench.router.hang_at = ""
    bench.publisher.moved_to(1, due=True)
    assert await bench.publisher.catch_up()
    assert [request.attempt for request in bench.router.requests[1:]] == [1, 2]


async def test_what_was_prepared_for_a_step_serves_no_other(bench: Bench) -> None:
    await published_once(bench)
    await bench.publisher.prepare_ahead(1)
    bench.publisher.moved_to(2, due=True)
    assert await bench.publisher.catch_up()
    assert [request.label for request in bench.router.requests] == [0, 1, 2]
    assert bench.publisher.published.label == 2


async def test_a_term_that_is_over_ends_the_trainer_also_ahead(bench: Bench) -> None:
    await published_once(bench)
    bench.router.fail_at = "stale prepare"
    with pytest.raises(StaleTerm):
        await bench.publisher.while_made(1, asyncio.sleep(0))


async def test_nothing_is_prepared_ahead_where_engines_have_to_join_a_group(bench: Bench) -> None:
    await published_once(bench)
    bench.transport.prepares_ahead = False
    await bench.publisher.prepare_ahead(1)
    assert len(bench.router.requests) == 1


async def test_what_was_prepared_and_will_not_be_sent_is_given_up(bench: Bench) -> None:
    await published_once(bench)
    await bench.publisher.forget_ahead()
    assert bench.router.aborted == []
    await bench.publisher.prepare_ahead(1)
    await bench.publisher.forget_ahead()
    await bench.publisher.forget_ahead()
    assert bench.router.aborted == ["t2"]


@pytest.mark.parametrize("bench", [("weights",)], indirect=True)
async def test_memory_is_asked_back_until_the_router_has_heard_and_then_weights_follow(bench: Bench) -> None:
    bench.router.set_engine("e", t.EngineState.STALE)
    bench.router.fail_at = "resume"
    async with bench.publisher.borrowing():
        pass
    await bench.heard()
    assert bench.router.engines["e"].state is t.EngineState.UPDATING
    bench.publisher.moved_to(1, due=True)
    assert bench.publisher.wanted
    assert not await bench.publisher.catch_up()
    assert bench.router.requests == [], "an engine without its memory takes no weights"
    assert bench.publisher.lacking
    assert 0 < bench.publisher.retry_in_s <= 60, "it is asked again, and not at once"
    bench.router.fail_at = ""
    bench.publisher.moved_to(1, due=True)
    assert await bench.publisher.catch_up()
    await bench.heard()
    assert bench.router.engines["e"].weight_label == 1
    assert not bench.publisher.lacking
